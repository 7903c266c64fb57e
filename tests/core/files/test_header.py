"""What a file says of the base that its adapter was trained on."""

from __future__ import annotations

import dataclasses

import pytest

from peft import CheckpointError, get_peft_model
from peft.core.acting.on_model import roster_of
from peft.core.files.header import Loaded, check_base, fill_base, fingerprint
from tests.helpers.tiny_llama import llama, lora


def adapted(**more):
    base = get_peft_model(llama(), lora(**more)).get_base_model()
    return base, roster_of(base).adapters["default"]


SITES = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]


def test_the_fingerprint_is_class_vocabulary_and_the_adapted_weights_shapes():
    expected = {"class": "LlamaForCausalLM", "vocab_size": 64, "shapes": {s: [16, 16] for s in SITES}}
    assert fingerprint(*adapted()) == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"class": "OtherForCausalLM"}, "trained on a OtherForCausalLM, this model has a LlamaForCausalLM"),
        ({"vocab_size": 80}, "vocabulary size 80, this model has vocabulary size 64"),
        ({"shapes": {SITES[0]: [16, 8]}}, r"q_proj had weight shape \[16, 8\]"),
    ],
)
def test_another_base_is_told_by_what_differs(change, said):
    base, adapter = adapted()
    loaded = Loaded(lora(), {}, {**fingerprint(base, adapter), **change}, "the file")
    with pytest.raises(CheckpointError, match=f"the file: .*{said}"):
        check_base(base, loaded, adapter)


def test_a_file_that_says_nothing_or_the_same_is_accepted():
    base, adapter = adapted()
    check_base(base, Loaded(lora(), {}), adapter)
    check_base(base, Loaded(lora(), {}, fingerprint(base, adapter)), adapter)
    check_base(base, Loaded(lora(), {}, {"class": None, "shapes": {"elsewhere": [1, 1]}}), adapter)


def test_the_config_learns_where_the_base_came_from():
    base = llama()
    base.name_or_path = "some/base"
    config = lora()
    fill_base(config, base)
    assert config.base_model_name_or_path == "some/base"
    assert config.auto_mapping["base_model_class"] == "LlamaForCausalLM"
    assert config.auto_mapping["parent_library"].startswith("transformers.")
    stated = dataclasses.replace(lora(task_type="CAUSAL_LM"), base_model_name_or_path="kept")
    fill_base(stated, base)
    assert stated.base_model_name_or_path == "kept" and stated.auto_mapping is None
