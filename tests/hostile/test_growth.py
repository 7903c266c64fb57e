"""Adapters that come and go under ever other names leave nothing behind: counted in objects."""

from __future__ import annotations

import gc
import warnings
from collections import Counter

import pytest
import torch
from torch import nn

from peft import LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model, inject_adapter_in_model
from peft.functional import delete_adapter
from tests.hostile import examples
from tests.promises.models import TOKENS, llama

CONFIGS = {
    "LORA": lambda: LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[1]
    ),
    "VERA": lambda: VeraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "PROMPT_TUNING": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


def objects() -> Counter[str]:
    gc.collect()
    return Counter(type(o).__name__ for o in gc.get_objects())


def growth(cycle, times: int) -> dict[str, int]:
    """What there is more of after `times` cycles, and as much more after as many again: what is made once is no growth."""
    with warnings.catch_warnings():  # pytest would keep each of them
        warnings.simplefilter("ignore")
        cycle("warm")
        counts = [objects()]
        for part in range(2):
            for i in range(times):
                cycle(f"name {part} {i}")
            counts.append(objects())
    grown = [{k: b[k] - a[k] for k in a} for a, b in zip(counts, counts[1:])]
    return {k: n for k, n in grown[0].items() if min(n, grown[1][k]) >= times // 2}


@pytest.mark.parametrize("name", CONFIGS)
def test_loading_and_deleting_under_ever_other_names_grows_nothing(name, tmp_path):
    config = CONFIGS[name]
    model = get_peft_model(llama(), config(), adapter_name="a").eval()
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    folder = tmp_path / "a"

    @torch.no_grad()
    def cycle(other: str) -> None:
        model.load_adapter(folder, other)
        model(input_ids=TOKENS, adapter_names=["a", other])
        with model.use_adapter(other), model.disable_adapter():
            model(input_ids=TOKENS)
        model.delete_adapter(other)

    assert growth(cycle, examples(10)) == {}
    held = [v for v in vars(model.roster).values() if isinstance(v, (set, dict, list, tuple))]
    assert all(len(v) < 12 for v in held), "the record of the adapters itself"


def test_failed_loads_of_other_libraries_grow_nothing():
    """They take a name out of `peft_config` when loading into an adapter of that name failed halfway."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    config = LoraConfig(r=2, target_modules=["0", "1"])
    inject_adapter_in_model(config, model, "a")

    def cycle(name: str) -> None:
        inject_adapter_in_model(config, model, name)
        model[0].roster.configs.pop(name)
        inject_adapter_in_model(config, model, f"{name} again")
        delete_adapter(model, f"{name} again")
        model[0].roster.configs.pop(name, None)

    assert growth(cycle, examples(10)) == {}
    assert len(model[0].roster.forgotten) <= 1 and len(model[0].methods) <= 2
