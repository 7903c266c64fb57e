"""Configs and files of models whose experts were separate layers: the stacks that hold them now."""

from __future__ import annotations

import pytest

from peft import LoraConfig
from peft.core.anatomy.older_layouts import Stack, retarget, stacked_experts
from peft.core.anatomy.walk import walk
from peft.registry import method
from tests.helpers.experts import base


def test_layers_have_a_path_for_each_expert_under_both_names_of_the_module():
    stack = Stack("m.mlp.experts", "down_proj", 2, ("w2",), "m.moe.experts")
    assert stack.full == "m.mlp.experts.down_proj"
    assert list(stack.layers("w2")) == [
        "m.mlp.experts.0.w2",
        "m.mlp.experts.1.w2",
        "m.moe.experts.0.w2",
        "m.moe.experts.1.w2",
    ]
    same = Stack("experts", "down_proj", 2, ("w2",), "experts")
    assert list(same.layers("w2")) == ["experts.0.w2", "experts.1.w2"]


def mixtral():
    model = base("mixtral")
    return model, stacked_experts(model, list(walk(model)))


def test_mixtrals_stacks_know_what_they_were():
    model, found = mixtral()
    if not found:
        pytest.skip("this transformers has the older layout itself")
    assert {(s.name, s.former, s.experts) for s in found} == {
        ("gate_up_proj", ("w1", "w3"), 3),
        ("down_proj", ("w2",), 3),
    }
    assert len(found) == 2 * 2 and all(s.was.endswith("block_sparse_moe.experts") for s in found)


def test_targets_of_the_older_layout_become_parameters_of_the_new_one():
    model, found = mixtral()
    if not found:
        pytest.skip("this transformers has the older layout itself")
    config = LoraConfig(target_modules=["q_proj", "w1", "w2", "w3"], r=4)
    retarget(model, config, method("LORA"))
    assert config.target_modules == {"q_proj"}
    assert sorted(config.target_parameters) == ["down_proj", "gate_up_proj"]
    with pytest.raises(ValueError, match="holds these layers together with w3: name w3, too"):
        retarget(model, LoraConfig(target_modules=["w1"]), method("LORA"))


def test_a_config_that_names_none_of_them_stays_as_it_is():
    model, _ = mixtral()
    config = LoraConfig(target_modules=["q_proj"])
    retarget(model, config, method("LORA"))
    assert config.target_modules == {"q_proj"} and not config.target_parameters
