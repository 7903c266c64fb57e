"""What all prompts share: their start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, Refusal, get_peft_model
from peft.core.forms.prompt import Encoded, PromptMethod
from tests.golden.prompt import make
from tests.helpers.prompts import config
from tests.helpers.tiny_llama import llama


def test_a_seed_decides_the_start_and_nothing_else_does():
    def start(draws: int) -> torch.Tensor:
        torch.rand(draws)
        settings = config("P_TUNING", 1, "llama_gqa", seed=4)
        return get_peft_model(make.build("llama_gqa"), settings).get_prompt_embedding_to_save("default")

    assert torch.equal(start(1), start(5))


SHAPE = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}


def test_sizes_are_read_from_the_model_and_stated_ones_must_be_its_own():
    config = PromptTuningConfig(**SHAPE)
    PromptMethod.prepare(config, llama())
    assert (config.num_layers, config.token_dim, config.num_attention_heads) == (2, 16, 2)
    assert config.num_transformer_submodules == 1
    with pytest.raises(ValueError, match="token_dim=8, but the embeddings of this model have 16 entries"):
        PromptMethod.prepare(PromptTuningConfig(token_dim=8, **SHAPE), llama())
    with pytest.raises(Refusal, match="no get_input_embeddings"):
        PromptMethod.prepare(PromptTuningConfig(**SHAPE), nn.Linear(2, 2))


def test_a_method_stands_before_the_input_or_before_each_attention():
    def made(config):
        return get_peft_model(llama(), config).roster.adapters["default"].methods[0][1]

    prompt, prefix = made(PromptTuningConfig(**SHAPE)), made(PrefixTuningConfig(**SHAPE))
    assert (prompt.inputs, prompt.keyed) == (3, 0) and (prefix.inputs, prefix.keyed) == (0, 3)
    with pytest.raises(AttributeError, match="puts no keys and values"):
        prompt.keys_values(0)
    with pytest.raises(AttributeError, match="puts no tokens"):
        prefix.prompt(None)


def test_a_result_without_its_network_becomes_a_table():
    model = get_peft_model(llama(), PromptEncoderConfig(encoder_hidden_size=8, **SHAPE))
    method = model.roster.adapters["default"].methods[0][1]
    assert isinstance(method, Encoded) and not method.lacks_network
    result = method.prompt_embeddings.detach().clone()
    assert not torch.equal(result, method.embedding.weight)
    method.resize({"prompt_embeddings": result})
    assert method.lacks_network and torch.equal(method.embedding.weight, result)
    assert torch.equal(method.prompt_embeddings, result) and set(method.table.keys) == {"embedding.weight"}


def test_whether_a_network_is_saved_is_asked_when_it_is_saved():
    config = peft.PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8, task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config)
    assert len(peft.get_peft_model_state_dict(model)) > 1
    model.peft_config["default"].save_encoder = False
    assert list(peft.get_peft_model_state_dict(model)) == ["prompt_embeddings"]
