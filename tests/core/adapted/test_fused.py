"""Base layer and adapters as one node."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model


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
