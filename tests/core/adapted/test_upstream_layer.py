"""Attributes and methods of an adapted layer that other libraries use."""

from __future__ import annotations

import torch

from peft import get_peft_model
from peft.core.adapted.upstream_layer import UpstreamLayer
from tests.helpers.tiny_llama import llama, logits, lora


def test_attributes_that_libraries_read_on_layers():
    model = get_peft_model(llama(), lora(lora_alpha=8))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (4, 16) and layer.r["default"] == 4
    assert layer.scaling["default"] == 2 and layer.lora_alpha["default"] == 8
    assert layer.in_features == layer.out_features == 16 and layer.get_base_layer().weight is layer.base_layer.weight
    assert set(layer.lora_B) == {"default"} and layer.active_adapters == ["default"] and not layer.merged
    out = logits(model)
    layer.scale_layer(3.0)
    assert layer.scaling["default"] == 6 and not torch.equal(logits(model), out)
    layer.unscale_layer(3.0)
    assert torch.equal(logits(model), out)


def test_base_weights_and_deltas_are_read_and_set_through_the_layer():
    model = get_peft_model(llama(), lora(lora_alpha=8))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert isinstance(layer, UpstreamLayer)
    (m,) = layer.methods["default"]
    assert torch.allclose(layer.get_delta_weight("default"), 2 * m.lora_B_weight @ m.lora_A_weight, atol=1e-6)
    layer.set_base_weight(torch.eye(16))
    assert torch.equal(layer.get_base_weight(), torch.eye(16))
    x = torch.randn(2, 16)
    assert torch.allclose(layer(x), x + 2 * x @ m.lora_A_weight.T @ m.lora_B_weight.T, atol=1e-5)
    layer.delete_adapter("default")
    assert layer._get_available_adapters() == set() and torch.allclose(layer(x), x, atol=1e-6)
