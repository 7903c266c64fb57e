"""Bare parameters found by `module.parameter`; names that match none are told with what is near."""

from __future__ import annotations

import pytest
from torch import nn

from peft import LoraConfig, NoMatchingPeftModuleError, Refusal, get_peft_model
from peft.core.anatomy.bare_parameters import find_parameters
from peft.layers.parameter import TwoMatrices


def net() -> nn.Module:
    made = nn.Sequential()
    made.left, made.right = TwoMatrices(), TwoMatrices()
    return made


def config(*names: str, **more) -> LoraConfig:
    return LoraConfig(target_modules=[], target_parameters=list(names), **more)


def test_a_name_finds_its_parameter_in_every_module_that_has_it():
    found = find_parameters(net(), config("first"))
    assert [p.path for p in found] == ["left.first", "right.first"]
    assert all(p.owner is not None and p.composite is not None for p in found)
    assert [p.path for p in find_parameters(net(), config("right.second"))] == ["right.second"]


def test_excluded_modules_are_left_out():
    found = find_parameters(net(), config("first", exclude_modules=["left"]))
    assert [p.path for p in found] == ["right.first"]


def test_a_name_that_matches_nothing_is_told_with_what_is_near():
    with pytest.raises(NoMatchingPeftModuleError, match=r"target_parameters 'right.frist' match no .*right\.first"):
        find_parameters(net(), config("second", "right.frist"))


def test_a_module_that_is_wrapped_keeps_its_parameters():
    model = nn.Sequential(nn.Linear(4, 4))
    get_peft_model(model, LoraConfig(target_modules=["0"]))
    with pytest.raises(Refusal, match="name the module in target_modules"):
        find_parameters(model, config("0.weight"))
