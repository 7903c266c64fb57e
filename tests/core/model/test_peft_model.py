"""The model that people hold: the base's weights under their own names."""

from __future__ import annotations

import pytest
import torch

import peft
from peft import get_peft_model
from tests.helpers.tiny_llama import llama, logits, lora


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
