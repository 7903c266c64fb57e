"""Upstream's names of what a method holds."""

from __future__ import annotations

import pytest
from torch import nn

from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from peft.contract.method import Method
from peft.core.adapted import view_names


def method(config: PeftConfig) -> Method:
    (made,) = get_peft_model(nn.Sequential(nn.Linear(6, 4)), config).get_base_model()[0].methods["default"]
    return made


LORA = LoraConfig(target_modules=["0"], r=2, lora_bias=True)
IA3 = IA3Config(target_modules=["0"], feedforward_modules=[])


def test_a_name_holds_a_module_of_leaves_or_a_bare_tensor():
    lora, ia3 = method(LORA), method(IA3)
    assert view_names.leaves(lora, "lora_A") == {"weight": "lora_A_weight"}
    assert set(view_names.leaves(lora, "lora_B")) == {"weight", "bias"}
    assert view_names.leaves(ia3, "ia3_l") == {"": "ia3_l_weight"} and view_names.leaves(ia3, "lora_A") == {}


@pytest.mark.parametrize(
    ("name", "held", "shown"),
    [
        ("lora_A", True, True),
        ("scaling", True, True),
        ("lora_dropout", True, True),
        ("lora_embedding_A", False, True),
        ("ia3_l", False, False),
    ],
)
def test_what_is_held_is_shown_and_so_are_names_that_stay_empty(name: str, held: bool, shown: bool):
    lora = method(LORA)
    assert (view_names.holds(lora, name), view_names.shows(lora, name)) == (held, shown)


def test_the_adapters_name_stands_before_the_leaf():
    lora, ia3 = method(LORA), method(IA3)
    keys = {view_names.upstream_name(lora, attr, key, "a") for attr, key in lora.table.own.items()}
    assert {"lora_A.a.weight", "lora_B.a.weight", "lora_B.a.bias"} <= keys
    assert view_names.upstream_name(ia3, "ia3_l_weight", "ia3_l", "a") == "ia3_l.a"


def test_a_sum_with_the_weight_is_told_from_other_effects():
    assert view_names.sums(method(LORA)) and not view_names.sums(method(IA3))
