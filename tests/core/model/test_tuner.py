"""The base model with adapters in it: what it tells of them, and penalties that reach the loss in training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peft import AdaLoraConfig, get_peft_model
from peft.core.model.tuner import Tuner, add_penalties
from tests.helpers.tiny_llama import TOKENS, llama, lora


def test_targets_and_prefix_are_those_of_the_adapters_own_methods():
    tuner = get_peft_model(llama(), lora(modules_to_save=["lm_head"])).base_model
    assert isinstance(tuner, Tuner)
    assert tuner.targeted_module_names == [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
    assert tuner.prefix == ".adapters.", "a head's copy has no name of the method's"
    assert get_peft_model(llama(), lora()).base_model.prefix == "lora_"


def test_a_models_config_is_a_dictionary_also_where_there_is_none():
    assert Tuner.get_model_config(llama())["model_type"] == "llama"
    assert Tuner.get_model_config(nn.Linear(2, 2)) == {"model_type": "custom"}
    assert Tuner.get_model_config(SimpleNamespace(config={"a": 1})) == {"a": 1}


def test_attributes_are_the_models_and_a_model_without_adapters_is_told():
    tuner = get_peft_model(llama(), lora()).base_model
    assert tuner.config is tuner.model.config and tuner.lm_head is tuner.model.lm_head
    tuner.unload()
    with pytest.raises(ValueError, match="no adapters"):
        tuner.peft_config  # noqa: B018


def test_a_penalty_is_added_to_the_loss_in_training_only():
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10, orth_reg_weight=0.5)
    model = get_peft_model(llama(), config)
    with torch.no_grad():
        for p in model.adapter_parameters("default"):
            p.add_(0.3 * torch.randn_like(p))
    plain = model.base_model.model(input_ids=TOKENS, labels=TOKENS).loss
    penalty = add_penalties(model.roster, SimpleNamespace(loss=torch.zeros(()))).loss
    assert penalty > 0.1
    assert torch.allclose(model.train()(input_ids=TOKENS, labels=TOKENS).loss, plain + penalty, atol=1e-5)
    assert torch.allclose(model.eval()(input_ids=TOKENS, labels=TOKENS).loss, plain, atol=1e-5)
    out = SimpleNamespace(logits=1)
    assert add_penalties(model.roster, out) is out
