"""Adapters as files: whose folder is which, plain pairs of factors, whole embeddings, upstream's names of prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft import PeftModel, get_peft_model
from peft.core.model.saving import as_it_is, as_plain_pairs, prompts_below, save_adapters
from peft.core.model.tuner import Tuner
from tests.helpers.tiny_llama import llama, logits, lora

PLAIN = {"safe": True, "embeddings": False, "plain_pairs": False, "gathered": None}
ROOT = "base_model.model."


def pissa() -> Tuner:
    """An adapter that starts from factors of W, moved away from its start: ΔW = s(B A − B₀ A₀)."""
    tuner = get_peft_model(llama(), lora(r=2, init_lora_weights="pissa")).base_model.eval()
    with torch.no_grad():
        for p in tuner.roster.adapters["default"].parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    return tuner


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("safe", [True, False])
def test_default_lies_at_the_top_and_others_in_folders_of_their_names(tmp_path, safe):
    model = get_peft_model(llama(), lora())
    model.add_adapter("b", lora(r=2))
    model.add_adapter("unsaved", lora())
    folders = save_adapters(model.base_model, ["b", "default"], str(tmp_path), **{**PLAIN, "safe": safe})
    assert not list(tmp_path.iterdir())  # written as they are asked for
    assert list(folders) == [str(tmp_path / "b"), str(tmp_path)]
    files = {"adapter_config.json", f"adapter_model.{'safetensors' if safe else 'bin'}"}
    assert {p.name for p in (tmp_path / "b").iterdir()} == files
    assert {p.name for p in tmp_path.iterdir()} == {*files, "b"}
    for name, folder in (("default", tmp_path), ("b", tmp_path / "b")):
        again = PeftModel.from_pretrained(llama(), folder).eval()
        model.set_adapter(name)
        assert torch.equal(logits(again), logits(model.eval()))


def test_whole_embeddings_are_written_where_they_are_asked_for(tmp_path):
    tuner = get_peft_model(llama(), lora()).base_model
    for embeddings in (False, True):
        list(save_adapters(tuner, ["default"], str(tmp_path / str(embeddings)), **{**PLAIN, "embeddings": embeddings}))
    without, whole = tensors(tmp_path / "False"), tensors(tmp_path / "True")
    more = {k: v for k, v in whole.items() if k not in without}
    assert more.keys() == {f"{ROOT}model.embed_tokens.weight", f"{ROOT}lm_head.weight"}
    base = llama().state_dict()
    assert all(torch.equal(v, base[k.removeprefix(ROOT)]) for k, v in more.items())


def test_an_adapter_as_it_is_has_its_own_name():
    tuner = pissa()
    with as_it_is(tuner, "default") as name:
        assert name == "default" and list(tuner.roster.adapters) == ["default"]


def test_plain_pairs_act_as_the_adapter_on_the_untouched_base(tmp_path):
    tuner = pissa()
    (path, method), *_ = tuner.roster.adapters["default"].methods
    expected, change = logits(tuner), method.dense().detach()
    (folder,) = save_adapters(tuner, ["default"], str(tmp_path), **{**PLAIN, "plain_pairs": True})
    assert folder == str(tmp_path)  # that of the adapter, not of its copy
    found = tensors(tmp_path)
    assert {k.split(".")[-2] for k in found} == {"lora_A", "lora_B"}
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert (logits(again) - expected).abs().max() < 1e-4 < (logits(llama()) - expected).abs().max()
    config = again.peft_config["default"]
    assert config.init_lora_weights not in ("pissa", "olora")  # nothing is subtracted after loading
    A, B = (found[f"{ROOT}{path}.lora_{n}.weight"] for n in "AB")
    scale = dict(again.roster.adapters["default"].methods)[path].strength
    assert torch.allclose(scale * B @ A, change, atol=1e-5)
    assert torch.linalg.matrix_rank(change, atol=1e-4) <= 2 * 2  # B A and B₀ A₀, rank 2 each


def test_the_copy_is_gone_afterwards_even_after_an_error():
    tuner = pissa()
    before = {n: p.clone() for n, p in tuner.named_parameters()}
    with pytest.raises(KeyError), as_plain_pairs(tuner, "default") as name:
        assert name != "default" and set(tuner.roster.adapters) == {"default", name}
        raise KeyError
    assert list(tuner.roster.adapters) == ["default"] and tuner.active_adapters == ["default"]
    after = dict(tuner.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(p, before[n]) for n, p in after.items())


def test_upstreams_names_of_prompts_become_ours():
    def tensor() -> torch.Tensor:
        return torch.zeros(1)

    prompt, weight, words, other = tensor(), tensor(), tensor(), tensor()
    state = {
        "m.prompt_encoder.default.embedding.weight": prompt,
        "m.base_model.layer.weight": weight,
        "m.word_embeddings.weight": words,
        "other.weight": other,
    }
    prompts_below(state, "m.")
    assert state.keys() == {
        "m.base_model.model.prompt_encoder.default.embedding.weight",
        "m.base_model.model.layer.weight",
        "other.weight",
    }
    assert state["m.base_model.model.layer.weight"] is weight and state["other.weight"] is other
    assert state["m.base_model.model.prompt_encoder.default.embedding.weight"] is prompt


def test_a_state_without_prompts_is_left_alone():
    state = {"m.base_model.model.layer.weight": torch.zeros(1), "word_embeddings.weight": torch.zeros(1)}
    before = dict(state)
    prompts_below(state, "m.")
    assert list(state) == list(before) and all(state[k] is v for k, v in before.items())
