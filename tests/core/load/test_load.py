"""Bringing a saved adapter into a model: keys renamed on the way, everything checked first, embeddings put back."""

from __future__ import annotations

import pytest
import torch

from peft import CheckpointError, LoraConfig, PeftModel, get_peft_model
from peft.core.acting.on_model import roster_of
from peft.core.adapted.layer import Adapted
from peft.core.load.load import LoadResult, load_into, read_adapter
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
    loaded = read_adapter(tmp_path, None, None, True, {})
    loaded.tensors = {k.replace("q_proj", "wq"): v for k, v in loaded.tensors.items()}
    base = llama()
    with pytest.raises(CheckpointError, match="does not fit"):
        load_into(base, loaded, "default")
    assert roster_of(base) is None and not any(isinstance(m, Adapted) for m in base.modules())
    with pytest.warns(UserWarning, match="4 tensors missing, 4 keys not used"):
        result = load_into(base, loaded, "default", strict=False)
    assert len(result.missing_keys) == len(result.unexpected_keys) == 4


def test_a_result_unpacks_as_missing_and_unexpected():
    missing, unexpected = LoadResult(["a"], ["b"], ["c"])
    assert (missing, unexpected) == (["a"], ["b"])


def without(folder, ending):
    """The adapter's file without the keys of this ending."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = [k for k in tensors if k.endswith(ending)]
    save_file({k: t for k, t in tensors.items() if k not in gone}, path)
    assert gone
    return gone


@pytest.mark.parametrize("ending", ["lora_A.weight", "lora_B.weight"])
def test_what_a_file_lacks_starts_fresh_and_is_named_when_not_strict(tmp_path, ending):
    """Memory that nobody wrote is never used: a fresh factor B is zero, a fresh factor A small and finite."""
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], r=4))
    for p in model.adapter_parameters("default"):
        p.data += 1
    model.save_pretrained(tmp_path)
    gone = without(tmp_path, ending)
    base = llama()
    with pytest.warns(UserWarning, match=gone[0].replace(".", r"\.")):
        found = load_into(base, read_adapter(tmp_path, None, None, False, {}), "default", strict=False)
    assert sorted(found.missing_keys) == sorted(gone)
    for _, m in roster_of(base).adapters["default"].methods:
        filled, kept = (
            (m.lora_A_weight, m.lora_B_weight) if ending == "lora_A.weight" else (m.lora_B_weight, m.lora_A_weight)
        )
        bound = m.lora_A_weight.shape[1] ** -0.5 if ending == "lora_A.weight" else 0.0
        assert filled.abs().max() <= bound and (filled.any() or not bound)
        assert (kept > 0.5).all()  # what the file has is there


def test_an_adapter_that_is_not_to_be_trained_leaves_the_model_in_evaluation(tmp_path):
    """As upstream does: a base's own dropout would otherwise stay on."""
    saved(tmp_path)
    assert not PeftModel.from_pretrained(llama().train(), tmp_path).training
    assert not any(m.training for m in PeftModel.from_pretrained(llama().train(), tmp_path).modules())
    trained = PeftModel.from_pretrained(llama().train(), tmp_path, is_trainable=True)
    assert trained.training
    trained.load_adapter(tmp_path, "other", is_trainable=True)
    assert trained.training
    trained.load_adapter(tmp_path, "third")
    assert not any(m.training for m in trained.modules())
