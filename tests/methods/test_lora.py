"""LoRA against its formula: strength, bias, patterns, starts, and what becomes of it in combinations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft.core.anatomy.patterns import for_path
from peft.methods.lora import Lora, LoraConfig
from tests.helpers.one_layer import adapted

TARGET = {"target_modules": ["site"]}
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def base_of(model) -> nn.Linear:
    return model.get_base_model().site.base_layer


@pytest.mark.parametrize(("rslora", "s"), [(False, 6 / 4), (True, 6 / math.sqrt(4))])
def test_the_output_is_that_of_w_plus_s_b_a(rslora, s):
    model, m = adapted(LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, **TARGET))
    layer = base_of(model)
    assert m.lora_A_weight.shape == (4, 16) and m.lora_B_weight.shape == (24, 4) and m.strength == pytest.approx(s)
    expected = F.linear(X, layer.weight + s * m.lora_B_weight @ m.lora_A_weight, layer.bias)
    assert torch.allclose(model(X), expected, atol=1e-5) and not torch.allclose(model(X), layer(X), atol=1e-2)


def test_a_trained_bias_is_as_strong_as_the_delta():
    model, m = adapted(LoraConfig(r=2, lora_alpha=6, lora_bias=True, **TARGET))
    layer = base_of(model)
    expected = F.linear(X, layer.weight + 3 * m.lora_B_weight @ m.lora_A_weight, layer.bias + 3 * m.lora_B_bias)
    assert torch.allclose(model(X), expected, atol=1e-5)


def test_dropout_acts_on_the_input_of_a_in_training_only():
    model, m = adapted(LoraConfig(r=2, lora_dropout=0.5, **TARGET))
    out = model(X)
    assert torch.equal(model(X), out)
    model.train()
    assert not torch.allclose(model(X), out, atol=1e-4)


def test_a_fresh_adapter_is_the_identity_with_a_kaiming_uniform_a():
    model, m = adapted(LoraConfig(r=64, **TARGET), noise=0.0)
    assert torch.equal(m.lora_B_weight, torch.zeros(24, 64)) and torch.equal(model(X), base_of(model)(X))
    assert 0.9 / 4 < m.lora_A_weight.abs().max() <= 1 / 4, "uniform in ±1/√fan_in"


def test_pissa_leaves_the_output_and_the_weight_alone_and_starts_from_its_largest_directions():
    model, m = adapted(LoraConfig(r=3, lora_alpha=3, init_lora_weights="pissa", **TARGET), noise=0.0)
    W = base_of(model).weight
    U, S, Vh = torch.linalg.svd(W)
    assert torch.allclose(m.lora_B_weight @ m.lora_A_weight, U[:, :3] * S[:3] @ Vh[:3], atol=1e-5)
    assert torch.allclose(model(X), base_of(model)(X), atol=1e-5) and m.rank() == 6


def test_patterns_override_rank_and_strength():
    _, m = adapted(LoraConfig(r=2, lora_alpha=2, rank_pattern={"site": 5}, alpha_pattern={"site": 20}, **TARGET))
    assert (m.own_r, m.own_alpha, m.strength) == (5, 20, 4)


def test_a_combination_has_its_ranks_and_no_strength_of_its_own():
    made = Lora.config_for_ranks(LoraConfig(r=2, lora_alpha=7, use_rslora=True), {"a": 4, "b": 4, "c": 6})
    assert made.r == made.lora_alpha == 4 and made.rank_pattern == made.alpha_pattern and not made.use_rslora
    assert list(made.rank_pattern.values()) == [6]


@pytest.mark.parametrize("rslora", [False, True])
def test_layers_that_are_one_parameter_now_keep_their_strength(rslora):
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=rslora, **TARGET)
    s = 8 / (math.sqrt(4) if rslora else 4)
    Lora.join(config, "site.weight", ["site.w1", "site.w3"])
    r, alpha = (for_path(p, "site.weight", None) for p in (config.rank_pattern, config.alpha_pattern))
    assert r == 8 and alpha / (math.sqrt(r) if rslora else r) == pytest.approx(s)
    uneven = LoraConfig(r=4, alpha_pattern={"w1": 99}, **TARGET)
    with pytest.raises(ValueError, match="at one strength, but alpha/r differs"):
        Lora.join(uneven, "site.weight", ["site.w1", "site.w3"])
