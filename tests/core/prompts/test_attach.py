"""How prompts come into models, and which models and inputs they refuse."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

import peft
from peft import PeftModel, Refusal, get_peft_model, inject_adapter_in_model
from tests.golden.prompt import make
from tests.helpers.prompts import METHODS, config, every_method, on, prompted, run


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
