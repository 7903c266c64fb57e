"""The model that people hold: the base's weights under their own names."""

from __future__ import annotations

import pytest
import torch

import peft
from peft import get_peft_model
from peft.core.model.peft_model import PeftModel
from tests.helpers.tiny_llama import TOKENS, llama, logits, lora


def test_base_weights_are_read_and_set_under_their_own_names():
    model = get_peft_model(llama(), lora(modules_to_save=["lm_head"], target_modules=["q_proj", "mlp.up_proj"]))
    state = peft.get_base_model_state_dict(model)
    assert list(state) == list(llama().state_dict())
    assert all(torch.equal(v, state[k]) for k, v in llama().state_dict().items())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other = llama(seed=3).state_dict()
    with pytest.raises(peft.CheckpointError, match="norm"):
        peft.set_base_model_state_dict(model, {k: v for k, v in other.items() if k != "model.norm.weight"})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    peft.set_base_model_state_dict(model, other)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama(seed=3)))


def test_the_wrapper_shows_the_acting_adapter_and_counts(capsys):
    model = get_peft_model(llama(), lora(modules_to_save=["lm_head"]), adapter_name="a")
    model.add_adapter("b", lora(r=2))
    assert isinstance(model, PeftModel) and model.active_adapter == "a" and model.peft_type == "LORA"
    assert model.modules_to_save == {"lm_head"} and model.has_active_enabled_adapter
    model.active_adapter = "b"
    assert model.active_peft_config.r == 2
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
    model.set_adapter("b")
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 4 * 2 * 32 and total == sum(p.numel() for p in model.parameters())
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,d} || all params: {total:,d}" in capsys.readouterr().out


def test_arguments_by_position_are_given_once():
    model = get_peft_model(llama(), lora(task_type="CAUSAL_LM")).eval()
    mask = torch.ones_like(TOKENS)
    with torch.no_grad():
        by_name = model(input_ids=TOKENS, attention_mask=mask, labels=TOKENS)
        by_position = model(TOKENS, mask, None, TOKENS)
    assert torch.equal(by_position.loss, by_name.loss)
    with pytest.raises(TypeError, match="each once"):
        model(TOKENS, mask, None, TOKENS, labels=TOKENS)
