"""Whole embeddings in a file: equal ones change nothing, others are a part of the adapter that goes with it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft import (
    CheckpointError,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.core.acting.on_model import roster_of
from peft.core.load.embeddings import embedding_tensors, places_of_embeddings
from tests.helpers.tiny_llama import llama, logits, lora

FILE = "adapter_model.safetensors"
TARGETS = {
    "attention": ["q_proj"],
    "embeddings, too": ["q_proj", "embed_tokens"],
    "both ends": ["embed_tokens", "lm_head"],
}


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def other_base(**more):
    base = llama(**more)
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(3).add_(0.1)
        if not base.config.tie_word_embeddings:
            base.get_output_embeddings().weight.mul_(0.5)
    return base


def saved(folder, base, targets, **more):
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **more)).eval()
    model.save_pretrained(folder, save_embedding_layers=True)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_other_embeddings_act_with_the_adapter_and_go_with_it(tmp_path, targets, tied):
    model = saved(tmp_path, other_base(tie_word_embeddings=tied), TARGETS[targets])
    expected = logits(model)
    base = llama(tie_word_embeddings=tied)
    before, plain = state(base), logits(base)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.allclose(logits(loaded), expected, atol=1e-5) and not torch.allclose(plain, expected, atol=1e-2)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), plain)
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "again")
    first, second = load_file(tmp_path / FILE), load_file(tmp_path / "again" / FILE)
    assert same(first, second), "it is saved again, under the same keys"
    again = PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path / "again", is_trainable=True).eval()
    assert torch.allclose(logits(again), expected, atol=1e-5)
    assert all("lora" in n for n, p in again.named_parameters() if p.requires_grad)
    assert torch.allclose(logits(again.merge_and_unload()), expected, atol=1e-5)
    loaded.load_adapter(tmp_path, "more")
    loaded.delete_adapter("default")
    loaded.set_adapter("more")
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    bare = loaded.unload()
    assert bare is base and same(state(bare), before) and torch.equal(logits(bare), plain)


@pytest.mark.parametrize("targets", TARGETS)
def test_equal_embeddings_are_no_part(tmp_path, targets):
    model = saved(tmp_path, llama(), TARGETS[targets])
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].saved_embeddings is None
    assert not any("saved_embeddings" in n for n, _ in loaded.named_modules())


def test_a_prompt_with_whole_embeddings_is_read_again(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    keys = {"prompt_embeddings", "base_model.model.embed_tokens.weight", "base_model.lm_head.weight"}
    assert load_file(tmp_path / FILE).keys() == keys, "upstream's"
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), logits(model))
    base = other_base()
    before = state(base)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.allclose(logits(loaded), logits(model), atol=1e-6)
    assert same(state(loaded.unload()), before)


def test_no_other_weight_of_the_base_lands(tmp_path):
    saved(tmp_path, llama(), ["q_proj"])
    tensors = load_file(tmp_path / FILE)
    for key in (
        "model.norm.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
    ):
        shape = llama().state_dict()[key.replace(".base_layer", "")].shape
        save_file({**tensors, f"base_model.model.{key}": torch.ones(shape)}, tmp_path / FILE)
        base = llama()
        before = state(base)
        with pytest.raises(CheckpointError, match=key):
            PeftModel.from_pretrained(base, tmp_path)
        assert same(state(base), before) and roster_of(base) is None
        with pytest.warns(UserWarning, match=key):
            loaded = PeftModel.from_pretrained(base, tmp_path, strict=False)
        assert same(state(loaded.unload()), before)


@pytest.mark.parametrize("strict", [True, False])
def test_embeddings_of_another_size_are_told(tmp_path, strict):
    saved(tmp_path, llama(), ["q_proj"])
    tensors = load_file(tmp_path / FILE)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(80, 16)}, tmp_path / FILE)
    base = llama()
    with pytest.raises(CheckpointError, match="resize the embeddings"):
        PeftModel.from_pretrained(base, tmp_path, strict=strict)
    assert roster_of(base) is None


def test_dora_on_another_embedding_is_refused(tmp_path):
    saved(tmp_path, other_base(), ["embed_tokens"], use_dora=True)
    with pytest.raises(CheckpointError, match="load the base that it was trained on"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_state_dict_changes_no_weight_of_the_base():
    model = get_peft_model(llama(attention_bias=True), lora())
    before = state(model.get_base_model())
    given = get_peft_model_state_dict(model)
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    for key, value in {
        f"{q}.base_layer.bias": torch.ones(16),
        "base_model.model.model.layers.0.self_attn.o_proj.bias": torch.ones(16),
        "base_model.model.model.norm.weight": torch.zeros(16),
        "base_model.model.lm_head.weight": torch.ones(64, 16),
    }.items():
        with pytest.raises(CheckpointError, match=key):
            set_peft_model_state_dict(model, {**given, key: value})
    with_all = get_peft_model_state_dict(model, save_embedding_layers=True)
    assert tuple(set_peft_model_state_dict(model, with_all)) == ([], []), "the base's own values change nothing"
    assert set_peft_model_state_dict(model, {**given, "base_model.model.x": torch.ones(1)}).unexpected_keys == [
        "base_model.model.x"
    ]
    assert same(state(model.get_base_model()), before)
    biased = get_peft_model(llama(attention_bias=True), lora(bias="lora_only"))
    found = get_peft_model_state_dict(biased)
    found[f"{q}.base_layer.bias"] = torch.ones(16)
    set_peft_model_state_dict(biased, found)
    assert get_peft_model_state_dict(biased)[f"{q}.base_layer.bias"].eq(1).all()


def test_what_is_written_are_both_ends_under_upstreams_keys(capsys):
    model = get_peft_model(llama(), lora())
    assert [p.path for p in places_of_embeddings(model.get_base_model())] == ["model.embed_tokens", "lm_head"]
    found = embedding_tensors(model.get_base_model(), model.roster.adapters["default"])
    assert list(found) == ["base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"]
    assert "2 whole embedding(s)" in capsys.readouterr().out


def test_the_field_is_not_written_and_not_read(tmp_path):
    saved(tmp_path, other_base(), ["q_proj"])
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert sorted(loaded.peft_config["default"].saved_embeddings) == ["lm_head", "model.embed_tokens"]
    loaded.save_pretrained(tmp_path / "again")
    assert "saved_embeddings" not in json.loads((tmp_path / "again" / "adapter_config.json").read_text())
