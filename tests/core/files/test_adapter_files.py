"""The two files of an adapter: written aside and renamed, read back, and the header that knows better than the JSON."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from peft import CheckpointError, get_peft_model
from peft.core.acting.on_model import roster_of
from peft.core.files.adapter_files import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, read, save
from peft.core.files.keys import state_dict_of
from tests.helpers.tiny_llama import llama, lora


def saved(folder, safe: bool = True, **more):
    base = get_peft_model(llama(), lora(**more)).get_base_model()
    roster = roster_of(base)
    save(base, roster, "default", folder, safe=safe)
    return base, state_dict_of(roster, "default")


def test_a_folder_holds_two_files_and_no_leftovers(tmp_path):
    saved(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {SAFETENSORS_WEIGHTS_NAME, "adapter_config.json"}
    saved(tmp_path, safe=False)
    assert {p.name for p in tmp_path.iterdir()} == {WEIGHTS_NAME, "adapter_config.json"}, "the other format is gone"


@pytest.mark.parametrize("safe", [True, False])
def test_what_is_read_is_what_was_saved(safe, tmp_path):
    _, state = saved(tmp_path, safe)
    loaded = read(tmp_path)
    assert loaded.tensors.keys() == state.keys()
    assert all(torch.equal(loaded.tensors[k], v) for k, v in state.items())
    assert loaded.config.r == 4 and loaded.config.inference_mode


def test_the_header_carries_the_config_and_the_base(tmp_path):
    saved(tmp_path)
    with safe_open(tmp_path / SAFETENSORS_WEIGHTS_NAME, "pt") as f:
        header = f.metadata()
    assert json.loads(header["peft_config"])["r"] == 4
    assert json.loads(header["peft_base"])["class"] == "LlamaForCausalLM"


def test_where_header_and_json_disagree_the_header_wins_with_a_warning(tmp_path):
    saved(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 99, "revision": "mine"}))
    with pytest.warns(UserWarning, match=r"disagrees with the header .* in lora_alpha;"):
        config = read(tmp_path).config
    assert config.lora_alpha == 8 and config.revision == "mine"


def test_missing_weights_and_weights_of_one_rank_are_told(tmp_path):
    with pytest.raises(ValueError, match="expected adapter_model.safetensors or adapter_model.bin"):
        read(tmp_path)
    _, state = saved(tmp_path, safe=False)
    torch.save({**state, next(iter(state)): torch.empty(0)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="written from one rank"):
        read(tmp_path)
