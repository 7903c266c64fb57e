"""Merging at one layer: what is written is composed on the original weight, and its very bits come back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import LoraConfig, LoReftConfig, Refusal
from peft.core.adapted.merge import Merging, merge_dtype
from tests.helpers.one_layer import adapted


def layer_of(model) -> Merging:
    return model.get_base_model().site


def test_merging_computes_in_fp32_at_least():
    assert merge_dtype(torch.bfloat16) is merge_dtype(torch.float32) is torch.float32
    assert merge_dtype(torch.float64) is torch.float64


def test_a_second_merge_is_composed_on_the_original_weight():
    model, a = adapted(LoraConfig(r=2, target_modules=["site"]))
    model.add_adapter("b", LoraConfig(r=2, target_modules=["site"], init_lora_weights=False))
    layer = layer_of(model)
    parameter, W = layer.base_layer.weight, layer.base_layer.weight.data.clone()
    layer.merge(adapter_names=["default"])
    assert torch.allclose(layer.base_layer.weight, W + a.dense(), atol=1e-6)
    layer.merge(adapter_names=["b"])
    assert layer.merged_adapters == ["default", "b"]
    expected = W + a.dense() + layer.methods["b"][0].dense()
    assert torch.allclose(layer.base_layer.weight, expected, atol=1e-6)
    layer.unmerge()
    assert layer.base_layer.weight is parameter and torch.equal(layer.base_layer.weight, W)
    assert layer.merged_adapters == [] and layer.record == {}


def test_what_is_merged_stays_as_strong_as_it_was():
    model, a = adapted(LoraConfig(r=2, target_modules=["site"]))
    layer = layer_of(model)
    W = layer.base_layer.weight.data.clone()
    strong = a.dense().clone()
    layer.merge()
    a.multiplier = 0.0
    layer.merge_as(dict(layer.record))
    assert torch.allclose(layer.base_layer.weight, W + strong, atol=1e-6) and a.multiplier == 0.0


def test_values_that_are_not_finite_are_refused_and_what_was_merged_stays():
    model, a = adapted(LoraConfig(r=2, target_modules=["site"]))
    model.add_adapter("b", LoraConfig(r=2, target_modules=["site"], init_lora_weights=False))
    layer = layer_of(model)
    layer.merge(adapter_names=["default"])
    merged = layer.base_layer.weight.data.clone()
    layer.methods["b"][0].lora_A_weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="site.weight would write NaN or inf"):
        layer.merge(adapter_names=["b"])
    assert layer.merged_adapters == ["default"] and torch.equal(layer.base_layer.weight, merged)


def test_an_effect_that_is_no_change_of_the_weights_is_refused():
    model, _ = adapted(LoReftConfig(r=2, target_modules=["site"], prefix_positions=1), nn.Linear(8, 8))
    with pytest.raises(Refusal, match="no change of the weights"):
        layer_of(model).merged_values(layer_of(model).methods["default"])
