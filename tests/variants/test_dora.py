"""DoRA over any delta."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import peft
from peft import PeftModel
from peft.methods.lora import LoraConfig
from peft.variants.dora import DoRA
from tests.helpers.additive import base, make
from tests.helpers.one_layer import adapted

DELTAS = [
    peft.LoraConfig(r=4, lora_bias=True, use_dora=True, target_modules=["lin1"]),
    peft.LoHaConfig(r=2, use_dora=True, target_modules=["lin1"]),
    peft.LoKrConfig(r=2, use_dora=True, target_modules=["lin1"]),
    peft.KronAConfig(use_dora=True, target_modules=["lin1"]),
    peft.VeraConfig(r=8, use_dora=True, target_modules=["lin1"]),
    peft.AdaLoraConfig(init_r=4, total_step=9, use_dora=True, target_modules=["lin1"]),
]


@pytest.mark.parametrize("config", DELTAS, ids=lambda c: c.peft_type.value)
def test_dora_over_any_delta(config):
    model = make(config)
    layer = model.base_model.model.lin1
    outer, inner = layer.methods["default"][0].nested()
    W, x = layer.base_layer.weight, torch.randn(5, 12)
    bias = layer.base_layer.bias + (0 if inner.bias_change() is None else inner.bias_change())

    def formula(scale):
        V = W + scale * delta
        return x @ (getattr(outer, outer.magnitude)[:, None] * V / V.norm(dim=1, keepdim=True)).T + bias

    with torch.no_grad():
        delta = inner.dense().clone()
        assert float(delta.abs().max()) > 1e-3
        assert torch.allclose(layer(x), formula(1.0), atol=1e-5)
        layer.set_scale("default", 0.5)  # reaches the delta inside
        bias = layer.base_layer.bias + (0 if inner.bias_change() is None else inner.bias_change())
        assert torch.allclose(layer(x), formula(0.5), atol=1e-5)
        layer.scale_layer(2.0)
        layer.unscale_layer(4.0)
        assert inner.multiplier == 0.25
    assert getattr(layer, f"{inner.prefix}magnitude_vector")["default"].weight.shape == (24,)
    assert "use_dora" in {**config.to_json_dict()}


def test_dora_scale_is_a_constant_in_backward():
    model = make(peft.LoraConfig(r=2, use_dora=True, target_modules=["lin1"]))
    layer, x = model.base_model.model.lin1, torch.randn(5, 12)
    outer, inner = layer.methods["default"][0].nested()
    layer(x).sum().backward()
    norm = (layer.base_layer.weight + inner.dense()).norm(dim=1).detach()
    scale = (outer.lora_magnitude_vector_weight / norm).detach()
    # d/dB of sum(scale ⊙ s·B A x) with the norm held still
    expected = inner.strength * scale[:, None] * (inner.lora_A_weight @ x.sum(0))[None]
    assert torch.allclose(inner.lora_B_weight.grad, expected, atol=1e-4)


def test_views_reach_the_delta_inside_dora():
    layer = make(peft.LoraConfig(r=2, use_dora=True, target_modules=["lin1"])).base_model.model.lin1
    inner = layer.methods["default"][0].nested()[-1]
    assert layer.lora_A["default"].weight is inner.lora_A_weight
    assert layer.r["default"] == 2 and layer.use_dora["default"]
    layer.scaling["default"] = 3.0
    assert inner.strength == pytest.approx(3.0)


def test_an_adapter_whose_file_lost_its_dora_vector_is_refused(tmp_path):
    model = make(peft.LoHaConfig(r=2, use_dora=True, target_modules=["lin1"]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.lin1.hada_magnitude_vector"]
    save_file(tensors, path)
    with pytest.raises(peft.CheckpointError, match="hada_magnitude_vector"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_dora_is_its_formula():
    """W' = m ⊙ (W + ΔW) / ‖W + ΔW‖, row by row; a fresh m is ‖W‖."""
    model, m = adapted(LoraConfig(r=2, lora_alpha=6, use_dora=True, target_modules=["site"]), noise=0.0)
    layer = model.get_base_model().site
    W, b = layer.base_layer.weight, layer.base_layer.bias
    assert isinstance(m, DoRA) and torch.allclose(m.lora_magnitude_vector_weight, W.norm(dim=1))
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.3 * torch.randn_like(p))
    V = W + 3 * m.inner.lora_B_weight @ m.inner.lora_A_weight
    expected = m.lora_magnitude_vector_weight[:, None] * V / V.norm(dim=1, keepdim=True)
    x = torch.randn(5, 16)
    assert torch.allclose(m.weight(W), expected, atol=1e-5)
    assert torch.allclose(model(x), F.linear(x, expected, b), atol=1e-4)
