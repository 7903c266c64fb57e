"""Attributes and methods of an adapted layer that other libraries use."""

from __future__ import annotations

import torch

from peft import get_peft_model
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
