"""One buffer for all trained parameters: the same steps as an optimizer over the parameters themselves."""

import copy

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.optimizers.flat import create_flat_optimizer


def model():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    return get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))


def train(m, optimizer, steps=4, max_norm=None, clear=None):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        (clear or optimizer.zero_grad)()
        m(x).square().sum().backward()
        if max_norm:
            nn.utils.clip_grad_norm_(m.parameters(), max_norm)
        optimizer.step()
    return [p.detach() for p in m.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "cls, settings", [(torch.optim.AdamW, {"lr": 1e-2}), (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9})]
)
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_steps_equal_those_of_separate_tensors(cls, settings, max_norm):
    one, other = model(), model()
    expected = train(one, cls([p for p in one.parameters() if p.requires_grad], **settings), max_norm=max_norm)
    found = train(other, create_flat_optimizer(other, cls, max_norm=max_norm, **settings))
    for e, f in zip(expected, found, strict=True):
        assert torch.allclose(e, f, atol=1e-6)


def test_one_tensor_is_what_the_optimizer_holds():
    m = model()
    optimizer = create_flat_optimizer(m, lr=1e-3)
    (whole,) = optimizer.param_groups[0]["params"]
    assert whole.numel() == sum(p.numel() for p in m.parameters() if p.requires_grad)


def test_gradients_cleared_by_the_model_and_values_loaded_meanwhile_count():
    one, other = model(), model()
    plain = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=1e-3)
    flat = create_flat_optimizer(other, torch.optim.SGD, lr=1e-3)
    for m, optimizer in ((one, plain), (other, flat)):
        train(m, optimizer, steps=2, clear=m.zero_grad)
        for p in m.parameters():
            if p.requires_grad:
                p.data = p.data * 0.5  # a load that puts another storage in
    for e, f in zip(train(one, plain, 2), train(other, flat, 2), strict=True):
        assert torch.allclose(e, f, atol=1e-6)


def test_what_cannot_lie_in_one_buffer_is_refused_and_left_alone():
    m = model()
    before = copy.deepcopy(m.state_dict())
    create_flat_optimizer(m, lr=1e-3)
    with pytest.raises(ValueError, match="share memory"):
        create_flat_optimizer(m, lr=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    m.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing here requires gradients"):
        create_flat_optimizer(m, lr=1e-3)
