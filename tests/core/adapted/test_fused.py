"""Base layer and adapters as one node."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft import LoraConfig, get_peft_model
from peft.core.adapted import fused
from tests.helpers.one_layer import adapted


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_base_parameter_that_someone_lets_train_gets_its_gradient(what):
    """Also where the adapted layer would run as one fused node, which knows of the adapter's gradients alone."""
    net = nn.Sequential(nn.Linear(6, 4))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    base = model.get_base_model()[0].base_layer
    x, y = torch.randn(3, 6), torch.randn(3, 4)
    getattr(base, what).requires_grad_(True)
    ((model(x) - y).square().sum()).backward()
    found = getattr(base, what).grad
    error = 2 * (model(x) - y)
    expected = error.sum(0) if what == "bias" else error.T @ x
    assert found is not None and torch.allclose(found, expected, atol=1e-5)


def test_products_run_as_one_node_and_all_else_is_left_to_others():
    """y = x (W + s·B A)ᵀ + b from one call; a convolution is no such product."""
    model, m = adapted(LoraConfig(r=2, lora_alpha=6, target_modules=["site"]), nn.Linear(6, 4))
    layer, x = model.get_base_model().site, torch.randn(3, 6)
    expected = F.linear(x, layer.base_layer.weight + 3 * m.lora_B_weight @ m.lora_A_weight, layer.base_layer.bias)
    assert torch.allclose(fused.run(layer, (m,), x), expected, atol=1e-5)
    assert fused.run(layer, (m,), x.to(torch.bfloat16)) is None, "W has another dtype than x"
    W, (term,) = fused.products(layer, (m,))
    assert W is layer.base_layer.weight and torch.allclose(term.scale * term.B @ term.A, m.dense(), atol=1e-6)
    model, m = adapted(LoraConfig(r=2, target_modules=["site"]), nn.Conv1d(6, 4, 3))
    layer = model.get_base_model().site
    assert fused.run(layer, (m,), torch.randn(2, 6, 5)) is None and fused.products(layer, (m,)) is None
