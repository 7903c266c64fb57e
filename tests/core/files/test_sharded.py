"""Tensors that are not whole here, and names and modules behind the wrappers of several processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import get_peft_model
from peft.contract.managed import like, split
from peft.contract.tree import WRAPPED
from peft.core.files.sharded import bare, flat, gathered, hollow, unreadable, unwrapped_name
from tests.helpers.tiny_llama import llama, lora


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("module.model.layers.0.weight", "model.layers.0.weight"),
        ("_orig_mod.model._fsdp_wrapped_module.lm_head.weight", "model.lm_head.weight"),
        ("model.module.weight", "model.module.weight"),
        ("model._checkpoint_wrapped_module.bias", "model.bias"),
    ],
)
def test_names_lose_the_steps_that_wrappers_add(name, expected):
    assert unwrapped_name(name) == expected


def holding(name: str, module: nn.Module) -> nn.Module:
    made = nn.Module()
    made.add_module(name, module)
    return made


def test_what_wrappers_hold_is_found_through_several_of_them():
    inner = around = nn.Linear(2, 2)
    for name in (*WRAPPED, "module"):
        around = holding(name, around)
    assert bare(around) is inner
    assert bare(nn.Sequential(inner)) is not inner, "a model of one layer is no wrapper"


def test_tensors_that_hold_no_values_are_told_from_those_that_do():
    assert unreadable(torch.zeros(2)) == "" and unreadable(torch.empty(2, device="meta")) == "meta device"
    assert unreadable(torch.empty(0)) == "zero elements" and hollow(torch.empty(0))
    assert unreadable(torch.empty(0, 4)) == "", "a matrix of rank 0"
    freed = torch.zeros(3)
    freed.untyped_storage().resize_(0)
    assert unreadable(freed) == "freed until the next forward"
    whole = torch.ones(2)
    assert not split(whole) and like(whole, torch.zeros(2)) is whole


def test_gathered_values_are_found_by_the_methods_place():
    model = get_peft_model(llama(), lora())
    values = {f"module.{k}": v + 1 for k, v in model.state_dict().items()}
    find = gathered(model, values)
    _, method = model.roster.adapters["default"].methods[0]
    assert torch.equal(find(method, "lora_A_weight"), method.lora_A_weight + 1)
    assert find(nn.Linear(2, 2), "weight") is None and gathered(model, None) is None
    assert not flat(model)
