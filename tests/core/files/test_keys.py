"""Keys in the file and tensors in memory: every key lands, every tensor is filled, or both sides are told."""

from __future__ import annotations

import pytest
import torch

from peft import CheckpointError, get_peft_model
from peft.core.acting.on_model import roster_of
from peft.core.files.keys import assign, check_fit, file_tensors, fit, modules_in_file, state_dict_of
from tests.helpers.tiny_llama import llama, lora

KEYS = [
    f"base_model.model.model.layers.{i}.self_attn.{p}_proj.lora_{x}.weight" for i in (0, 1) for p in "qv" for x in "AB"
]


def adapted(name: str = "default", **more):
    roster = roster_of(get_peft_model(llama(), lora(**more), adapter_name=name).get_base_model())
    return roster, roster.adapters[name]


def test_keys_come_from_the_places_and_never_from_the_adapters_name():
    for name in ("default", "lora_A.weight"):
        roster, adapter = adapted(name)
        assert [k for k, _ in file_tensors(adapter)] == KEYS
        assert list(state_dict_of(roster, name)) == KEYS


def test_a_files_tensors_fill_the_adapter_with_or_without_the_wrappers_prefix():
    source, _ = adapted()
    state = {k: torch.randn_like(v) for k, v in state_dict_of(source, "default").items()}
    for given in (state, {k.removeprefix("base_model.model."): v for k, v in state.items()}):
        roster, adapter = adapted()
        pairs, missing, extra = fit(roster, adapter, given)
        assert not missing and not extra
        check_fit(pairs, missing, extra, "")
        assign(pairs, adapter)
        assert all(torch.equal(v, state[k]) for k, v in state_dict_of(roster, "default").items())


def test_what_does_not_fit_is_told_from_both_sides():
    roster, adapter = adapted()
    state = state_dict_of(roster, "default")
    moved = KEYS[0].replace("q_proj", "k_proj")
    renamed = {moved if k == KEYS[0] else k: v for k, v in state.items()}
    pairs, missing, extra = fit(roster, adapter, renamed)
    assert missing == [KEYS[0]] and extra == [moved] and len(pairs) == len(KEYS) - 1
    with pytest.raises(
        CheckpointError, match=r"(?s)the file does not fit.*1 tensors.*q_proj.*1 keys.*k_proj.*7 of 8 keys fit"
    ):
        check_fit(pairs, missing, extra, "the file")
    pairs, missing, extra = fit(roster, adapter, {**state, KEYS[0]: torch.zeros(3, 16)})
    with pytest.raises(CheckpointError, match=r"size mismatch.*file \(3, 16\), model \(4, 16\)"):
        check_fit(pairs, missing, extra, "the file")


def test_the_modules_that_a_file_is_for_are_read_from_its_keys():
    assert modules_in_file(KEYS, lora()) == {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"}
    assert modules_in_file(KEYS, lora(target_parameters=["experts.down_proj"])) is None


def test_tensors_without_values_are_not_written():
    roster, adapter = adapted()
    next(slot for _, slot in file_tensors(adapter)).tensor.data = torch.empty(0)
    with pytest.raises(CheckpointError, match=r"'default': .*lora_A.weight holds no values \(zero elements\)"):
        state_dict_of(roster, "default")
