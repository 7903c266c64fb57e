"""LoRA-FA: A is frozen, and B's gradient is projected on what A can reach, before AdamW."""

from __future__ import annotations

import torch
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.optimizers.lorafa import LoraFAOptimizer, create_lorafa_optimizer


def model():
    torch.manual_seed(0)
    return get_peft_model(
        nn.Sequential(nn.Linear(6, 4)),
        LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False),
    )


def test_a_is_frozen_and_the_rest_trains():
    net = model()
    optimizer = create_lorafa_optimizer(net, r=2, lora_alpha=6, lr=0.1)
    m = net.get_base_model()[0].methods["default"][0]
    assert isinstance(optimizer, LoraFAOptimizer) and not m.lora_A_weight.requires_grad
    assert [p for g in optimizer.param_groups for p in g["params"]] == [m.lora_B_weight]


def test_a_step_is_adamw_on_the_projected_gradient():
    """∇B (A Aᵀ)⁻¹ / s² into torch's AdamW gives the very values."""
    net = model()
    optimizer = create_lorafa_optimizer(net, r=2, lora_alpha=6, lr=0.1)
    m = net.get_base_model()[0].methods["default"][0]
    twin = nn.Parameter(m.lora_B_weight.detach().clone())
    plain = torch.optim.AdamW([twin], lr=0.1, eps=1e-6, weight_decay=0.0)
    A, s = m.lora_A_weight.detach(), 3.0
    for seed in range(3):
        gradient = 100 * torch.randn(4, 2, generator=torch.Generator().manual_seed(seed))
        m.lora_B_weight.grad, twin.grad = gradient.clone(), gradient @ torch.linalg.inv(A @ A.T) / s**2
        optimizer.step()
        plain.step()
    assert torch.allclose(m.lora_B_weight, twin, atol=1e-4)


def test_decay_is_apart_from_the_gradient():
    net = model()
    optimizer = create_lorafa_optimizer(net, r=2, lora_alpha=6, lr=0.1, weight_decay=0.5)
    m = net.get_base_model()[0].methods["default"][0]
    before = m.lora_B_weight.detach().clone()
    m.lora_B_weight.grad = torch.zeros(4, 2)
    optimizer.step()
    assert torch.allclose(m.lora_B_weight, 0.95 * before)


def test_a_closure_is_called_with_gradients_on():
    net = model()
    optimizer = create_lorafa_optimizer(net, r=2, lora_alpha=6, lr=0.1)
    x = torch.randn(3, 6)

    def closure():
        optimizer.zero_grad()
        loss = net(x).square().sum()
        loss.backward()
        return loss

    before = closure().item()
    for _ in range(5):
        optimizer.step(closure)
    assert closure().item() < before
