"""Bottleneck adapters against the formulas written out again, and where they go."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft import LoReftConfig, Refusal, get_peft_model
from peft.core.adapted.layer import adapted_layers
from peft.methods.bottleneck import BottleneckConfig
from tests.helpers.activation import CONFIGS, Net, adapted, base, on_layer


def test_the_sequential_adapter_is_the_paper_s_formula():
    layer = nn.Linear(12, 16)
    config = BottleneckConfig(target_modules=["site"], bottleneck_size=3, non_linearity="tanh", scaling=0.5)
    model, m = on_layer(layer, config)
    x = torch.randn(2, 5, 12)
    h = layer(x)
    z = torch.tanh(h @ m.adapter_down_weight.T + m.adapter_down_bias)
    expected = h + 0.5 * (z @ m.adapter_up_weight.T + m.adapter_up_bias)
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_the_parallel_adapter_reads_the_input():
    layer = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16))
    config = BottleneckConfig(target_modules=["site"], variant="parallel", bottleneck_size=3, scaling=4.0)
    model, m = on_layer(layer, config)
    x = torch.randn(2, 5, 12)
    z = torch.relu(x @ m.adapter_down_weight.T + m.adapter_down_bias)
    expected = layer(x) + 4 * (z @ m.adapter_up_weight.T + m.adapter_up_bias)
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_learned_and_gated_scaling_and_the_layer_norm():
    layer, x = nn.Linear(16, 16), torch.randn(2, 16)
    for scaling in ("learned", "gated"):
        config = BottleneckConfig(target_modules=["site"], bottleneck_size=3, scaling=scaling, layer_norm=True)
        model, m = on_layer(layer, config)
        y = layer(x)
        h = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        h = h * m.adapter_norm_weight + m.adapter_norm_bias
        z = torch.relu(h @ m.adapter_down_weight.T + m.adapter_down_bias) @ m.adapter_up_weight.T + m.adapter_up_bias
        if scaling == "learned":
            s = m.adapter_scaling_weight
        else:
            s = 1 / (1 + torch.exp(-(h @ m.adapter_gate_weight.T + m.adapter_gate_bias)))
        assert torch.allclose(model(x), y + s * z, atol=1e-5)


def paths(model):
    return {layer.path for layer in adapted_layers(model)}


def test_pfeiffer_is_after_the_ffn_only_and_houlsby_after_attention_too():
    pfeiffer, houlsby = (paths(adapted("bert", CONFIGS[v]())) for v in ("pfeiffer", "houlsby"))
    assert pfeiffer == {f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)}
    assert houlsby == pfeiffer | {f"bert.encoder.layer.{i}.attention.output.dense" for i in (0, 1)}
    assert len(paths(adapted("t5", CONFIGS["houlsby"]()))) == 2 * 2 + 2 * 3  # cross-attention, too
    assert paths(adapted("opt", CONFIGS["pfeiffer"]())) == {f"model.decoder.layers.{i}.fc2" for i in (0, 1)}


def test_blocks_can_be_chosen_by_number():
    config = LoReftConfig(r=2, target_modules=["layers.0", "layers.1"], layers_to_transform=[1])
    assert paths(adapted("llama", config)) == {"model.layers.1"}


def test_parallel_needs_vectors_in_the_places_of_the_outputs():
    config = BottleneckConfig(target_modules=["site"], variant="parallel", bottleneck_size=2)
    for layer, why in ((nn.Embedding(9, 16), "indices"), (nn.Conv1d(4, 8, 3), "positions")):
        with pytest.raises(Refusal, match=why):
            get_peft_model(Net(layer), copy.deepcopy(config))
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(base("bert"), CONFIGS["parallel"]())
