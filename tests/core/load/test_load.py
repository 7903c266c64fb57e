"""Bringing a saved adapter into a model: keys renamed on the way, everything checked first, embeddings put back."""

from __future__ import annotations

import pytest
import torch

from peft import CheckpointError, get_peft_model
from peft.core.acting.on_model import roster_of
from peft.core.adapted.layer import Adapted
from peft.core.load.load import LoadResult, base_tensors, embedding_tensors, load_into, read_adapter
from tests.helpers.tiny_llama import llama, logits, lora


def saved(folder):
    model = get_peft_model(llama(), lora()).eval()
    model.save_pretrained(folder)
    return model


def test_a_file_is_read_planned_and_filled(tmp_path):
    model, base = saved(tmp_path), llama()
    found = load_into(base, read_adapter(tmp_path, None, None, True, {}), "mine")
    assert tuple(found) == ([], []) and list(roster_of(base).adapters) == ["mine"]
    assert torch.equal(logits(base), logits(model))


def test_the_first_pattern_that_matches_renames_a_key(tmp_path):
    saved(tmp_path)
    loaded = read_adapter(tmp_path, None, {r"^model\.layers": "h", r"^h": "twice"}, True, {})
    assert loaded.tensors and all(k.startswith("base_model.model.h.") for k in loaded.tensors)


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    saved(tmp_path)
    loaded = read_adapter(tmp_path, None, {"q_proj": "wq"}, True, {})
    base = llama()
    with pytest.raises(CheckpointError, match="does not fit"):
        load_into(base, loaded, "default")
    assert roster_of(base) is None and not any(isinstance(m, Adapted) for m in base.modules())
    with pytest.warns(UserWarning, match="4 tensors missing, 4 keys not used"):
        result = load_into(base, loaded, "default", strict=False)
    assert len(result.missing_keys) == len(result.unexpected_keys) == 4


def test_whole_embeddings_are_base_weights_that_are_put_back(capsys):
    model = get_peft_model(llama(), lora())
    adapter = model.roster.adapters["default"]
    tensors = embedding_tensors(model.get_base_model())
    assert list(tensors) == ["base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"]
    assert "2 whole embedding(s)" in capsys.readouterr().out
    found, rest = base_tensors(model.get_base_model(), adapter, tensors, [*tensors, "base_model.model.else.weight"])
    base = model.get_base_model()
    assert [id(p) for p, _ in found] == [id(base.model.embed_tokens.weight), id(base.lm_head.weight)]
    assert rest == ["base_model.model.else.weight"]
    wrong = {"base_model.model.lm_head.weight": torch.zeros(80, 16)}
    with pytest.raises(CheckpointError, match="resize the embeddings"):
        base_tensors(model.get_base_model(), adapter, wrong, list(wrong))


def test_a_result_unpacks_as_missing_and_unexpected():
    missing, unexpected = LoadResult(["a"], ["b"], ["c"])
    assert (missing, unexpected) == (["a"], ["b"])
