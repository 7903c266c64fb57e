"""How prompts come into models, and which models and inputs they refuse."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

import peft
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    Refusal,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.core.prompts.attach import Encoders, attach, detach, embedding_to_save, get_prompt, hooks_of
from tests.golden.prompt import make
from tests.helpers.prompts import METHODS, config, every_method, on, prompted, run
from tests.helpers.tiny_llama import llama


@every_method
def test_it_is_injectable(method, example):
    settings = config(method, example, "llama_gqa")
    model = inject_adapter_in_model(settings, make.build("llama_gqa"))
    wrapped = get_peft_model(make.build("llama_gqa"), settings).eval()
    state = peft.get_peft_model_state_dict(wrapped)
    peft.set_peft_model_state_dict(model, state)
    assert torch.equal(run(model, "llama_gqa"), run(wrapped, "llama_gqa"))
    assert any("prompt_encoder.default." in n for n, p in model.named_parameters() if p.requires_grad)


@every_method
def test_names_are_free_and_upstream_functions_answer(method, example):
    made = prompted(method, example, name="train.v1")
    assert made.prompt_encoder is made.get_base_model().prompt_encoder
    saved = made.get_prompt_embedding_to_save("train.v1")
    assert torch.equal(saved, peft.get_peft_model_state_dict(made, adapter_name="train.v1")["prompt_embeddings"])
    got = made.get_prompt(2)
    n = made.peft_config["train.v1"].num_virtual_tokens
    assert got.shape == (2, n, make.D) if torch.is_tensor(got) else got.get_seq_length() == n
    assert "task_ids" in made.special_peft_forward_args
    assert made.word_embeddings is made.get_base_model().get_input_embeddings()


@every_method
def test_transformers_own_adapter_functions(method, example, monkeypatch):
    from transformers.integrations import peft as integration

    monkeypatch.setattr(integration, "check_peft_version", lambda **_: None)  # it asks for an installed package
    model = make.build("llama_gqa")
    base = run(model, "llama_gqa")
    model.add_adapter(config(method, example, "llama_gqa"), adapter_name="a")
    assert model.active_adapters() == ["a"]
    out = run(model.eval(), "llama_gqa")
    assert not torch.equal(out[:, -6:], base)
    model.disable_adapters()
    assert torch.equal(run(model, "llama_gqa"), base)
    model.enable_adapters()
    assert torch.equal(run(model, "llama_gqa"), out)


@every_method
def test_models_without_token_embeddings_are_refused(method, example):
    base = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(Refusal, match="token embeddings"):
        get_peft_model(base, METHODS[method].config_class(num_virtual_tokens=2))
    assert not hasattr(base, "prompt_encoder")


def test_attention_that_takes_no_cache_refuses_prefixes():
    base = tf.DistilBertModel(tf.DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=24))
    with pytest.raises(Refusal, match="no way in"):
        get_peft_model(base, peft.PrefixTuningConfig(num_virtual_tokens=2))


@every_method
def test_the_wrong_base_is_named(method, example, tmp_path):
    prompted(method, example).save_pretrained(tmp_path)
    other = tf.LlamaForCausalLM(tf.LlamaConfig(**{**make.LLAMA, "hidden_size": 32}, num_key_value_heads=1))
    with pytest.raises((ValueError, RuntimeError), match=r"token_dim|num_attention_heads|size mismatch"):
        PeftModel.from_pretrained(other, tmp_path)
    assert not hasattr(other, "prompt_encoder")


@every_method
def test_packed_texts_and_shaped_masks_are_refused(method, example):
    made = prompted(method, example)
    ids = make.inputs("llama_gqa")["input_ids"]
    with pytest.raises(ValueError, match="packed"):
        made(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]] * 2))
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask"):
        made(input_ids=ids, attention_mask=mask)


@on(
    ("name", "fields", "message"),
    [
        ("PromptTuningConfig", {"num_virtual_tokens": 0}, "num_virtual_tokens"),
        ("PromptTuningConfig", {"prompt_tuning_init": "GUESS"}, "RANDOM"),
        ("PromptTuningConfig", {"prompt_tuning_init": "TEXT"}, "tokenizer_name_or_path"),
        ("PromptTuningConfig", {"tokenizer_kwargs": {"a": 1}}, "tokenizer_kwargs"),
        ("PrefixTuningConfig", {"init_weights": "one"}, "init_weights"),
        ("PromptEncoderConfig", {"encoder_reparameterization_type": "GRU"}, "MLP, LSTM"),
        ("PromptEncoderConfig", {"encoder_dropout": 1.0}, "encoder_dropout"),
        ("MultitaskPromptTuningConfig", {"num_ranks": 0}, "num_ranks"),
    ],
)
def test_bad_configs_say_what_is_wrong(name, fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(make.build("llama_gqa"), getattr(peft, name)(**{"num_virtual_tokens": 2, **fields}))


def test_the_last_method_takes_the_hooks_along():
    shape = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    model = get_peft_model(llama(), PromptTuningConfig(**shape), adapter_name="a")
    model.add_adapter("b", PromptTuningConfig(**shape))
    base, roster = model.get_base_model(), model.roster
    assert isinstance(base.prompt_encoder, Encoders) and set(base.prompt_encoder) == {"a", "b"}
    hooked = [m for m in base.modules() if m._forward_pre_hooks]
    assert hooked
    held = roster.adapters["b"].methods[0][1]
    detach(base, roster, "a")
    assert list(base.prompt_encoder.keys()) == ["b"] and base.prompt_encoder["b"] is held
    detach(base, roster, "b")
    assert hooks_of(base) is None and not hasattr(base, "prompt_encoder")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in base.modules())
    attach(base, roster, "b", held)
    assert hooks_of(base) is not None and base.prompt_encoder["b"] is held


def test_the_prompt_that_acts_is_given_by_row_or_as_a_cache():
    shape = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    model = get_peft_model(llama(), PromptTuningConfig(**shape))
    ((_, method),) = model.roster.adapters["default"].methods
    assert torch.equal(get_prompt(model.get_base_model(), 3), method.embedding.weight.expand(3, 2, 16))
    assert torch.equal(embedding_to_save(model.roster, "default"), method.embedding.weight)
    prefix = get_peft_model(llama(), PrefixTuningConfig(**shape))
    assert get_prompt(prefix.get_base_model(), 3).get_seq_length() == 2
    plain = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="No prompt method is active"):
        get_prompt(plain.get_base_model(), 1)
    with pytest.raises(ValueError, match=r"'default' \(.*LORA\) has no prompt"):
        embedding_to_save(plain.roster, "default")
