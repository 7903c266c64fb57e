"""Functions on whole models."""

from __future__ import annotations

import pytest
import torch

import peft
from peft import PeftModelForCausalLM, get_peft_model
from peft.core.model.functions import (
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from tests.helpers.tiny_llama import llama, lora


def test_mixed_precision_casts_the_frozen_part_only():
    model = get_peft_model(llama(), lora())
    peft.cast_mixed_precision_params(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_the_task_decides_the_class_and_a_wrapped_model_gets_another_adapter():
    model = get_peft_model(llama(), lora(task_type="CAUSAL_LM"), adapter_name="a")
    assert type(model) is PeftModelForCausalLM
    assert get_peft_model(model, lora(), adapter_name="b") is model and model.active_adapters == ["b"]


def test_missing_and_unused_keys_are_told_as_upstream_names_them():
    model = get_peft_model(llama(), lora(), adapter_name="mine")
    state = get_peft_model_state_dict(model, adapter_name="mine")
    gone = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    given = {**{k: v + 1 for k, v in state.items() if k != gone}, "base_model.model.elsewhere.weight": torch.zeros(1)}
    with pytest.warns(UserWarning, match="Missing keys when loading adapter 'mine'"):
        missing, unused = set_peft_model_state_dict(model, given, "mine")
    assert missing == [gone.replace(".weight", ".mine.weight")] and unused == ["base_model.model.elsewhere.weight"]
    now = get_peft_model_state_dict(model, adapter_name="mine")
    assert torch.equal(now[gone], state[gone]) and all(torch.equal(now[k], given[k]) for k in now if k != gone)


def test_an_injected_adapter_has_keys_without_the_wrappers_prefix():
    model = inject_adapter_in_model(lora(), llama())
    state = get_peft_model_state_dict(model)
    assert state and all(k.startswith("model.layers.") for k in state)
    only = {k: v for k, v in state.items() if "layers.0.self_attn.q_proj" in k}
    again = inject_adapter_in_model(lora(), llama(), state_dict={f"base_model.model.{k}": v for k, v in only.items()})
    assert set(get_peft_model_state_dict(again)) == set(only), "the adapter goes just where its tensors belong"


def test_the_tensors_of_a_folder_have_memory_of_their_own(tmp_path):
    model = get_peft_model(llama(), lora())
    model.save_pretrained(tmp_path)
    found, state = load_peft_weights(tmp_path), get_peft_model_state_dict(model)
    assert found.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in found.items())
    assert len({v.untyped_storage().data_ptr() for v in found.values()}) == len(found)
    with pytest.raises(ValueError, match="'other' is not in this model"):
        set_peft_model_state_dict(model, state, "other")
    with pytest.raises(ValueError, match="no adapters"):
        get_peft_model_state_dict(llama())
