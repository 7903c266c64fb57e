"""Multitask prompt tuning: a target task starts from source tasks."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import peft
from peft import get_peft_model
from peft.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig
from tests.golden.prompt import make


def test_source_tasks_start_a_target_task(tmp_path):
    shape = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "num_ranks": 2}
    source = get_peft_model(make.build("llama_gqa"), MultitaskPromptTuningConfig(num_tasks=3, **shape))
    source.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    path = str(tmp_path / "adapter_model.safetensors")

    def start(how: str, **more) -> dict[str, torch.Tensor]:
        more = {"prompt_tuning_init_state_dict_path": path, **more}
        settings = MultitaskPromptTuningConfig(num_tasks=1, prompt_tuning_init=how, **shape, **more)
        return peft.get_peft_model_state_dict(get_peft_model(make.build("llama_gqa"), settings))

    for how, expected in (
        ("AVERAGE_SOURCE_TASKS", held["prefix_task_cols"].mean(0, keepdim=True)),
        ("EXACT_SOURCE_TASK", held["prefix_task_cols"][1:2]),
    ):
        found = start(how, prompt_tuning_init_task=1)
        assert torch.equal(found["prefix_task_cols"], expected)
        assert torch.equal(found["prompt_embeddings"], held["prompt_embeddings"])
    shared = start("ONLY_SOURCE_SHARED")
    assert torch.equal(shared["prompt_embeddings"], held["prompt_embeddings"])
    assert not torch.equal(shared["prefix_task_cols"][0], held["prefix_task_cols"][0])
    with pytest.raises(ValueError, match="needs to be specified"):
        start("EXACT_SOURCE_TASK", prompt_tuning_init_state_dict_path=None)
