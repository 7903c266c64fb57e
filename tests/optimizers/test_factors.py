"""Which trained parameters stand in which factor, found by asking the delta itself."""

from __future__ import annotations

import pytest
from torch import nn

from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model
from peft.optimizers.factors import adapters_of, factors, methods, pairs


def model(config, base=None):
    return get_peft_model(base if base is not None else nn.Sequential(nn.Linear(6, 4)), config)


def test_lora_has_a_next_to_x_and_b_last():
    net = model(LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    (m,) = methods(net)
    first, last = factors(m)
    assert first == [m.lora_A_weight] and last == [m.lora_B_weight]
    (pair,) = pairs(net)
    assert pair.A is m.lora_A_weight and pair.B is m.lora_B_weight and pair.strength == 3


def test_what_dora_wraps_is_asked_too_and_frozen_parameters_stay_frozen():
    net = model(LoraConfig(r=2, use_dora=True, target_modules=["0"]))
    outer, inner = methods(net)
    assert outer is not inner and factors(outer) == ([], []) and factors(inner)[1] == [inner.lora_B_weight]
    inner.lora_A_weight.requires_grad_(False)
    assert factors(inner)[0] == [inner.lora_A_weight] and not inner.lora_A_weight.requires_grad


def test_methods_without_two_trainable_factors_have_no_pair():
    (m,) = methods(model(IA3Config(target_modules=["0"], feedforward_modules=[])))
    assert factors(m) == ([], [])
    for config in (IA3Config(target_modules=["0"], feedforward_modules=[]), VeraConfig(r=2, target_modules=["0"])):
        with pytest.raises(ValueError, match="two trainable factors A and B"):
            pairs(model(config))


def test_a_model_without_adapters_is_told():
    with pytest.raises(ValueError, match="no adapters to train"):
        adapters_of(nn.Linear(2, 2))
