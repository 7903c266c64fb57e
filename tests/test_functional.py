"""Adapters in models without a wrapper."""

from __future__ import annotations

import torch

import peft
from tests.helpers.tiny_llama import llama, logits, lora


def test_functions_on_models_without_a_wrapper():
    from peft import functional

    model = peft.inject_adapter_in_model(lora(), llama(), "a")
    peft.inject_adapter_in_model(lora(), model, "b")
    assert set(peft.get_peft_model_state_dict(model, adapter_name="b")) == {
        f"model.layers.{i}.self_attn.{p}_proj.lora_{x}.weight" for i in (0, 1) for p in "qv" for x in "AB"
    }
    twin = peft.inject_adapter_in_model(lora(), llama(), "b")
    peft.set_peft_model_state_dict(twin, peft.get_peft_model_state_dict(model, adapter_name="b"), "b")
    functional.set_adapter(model, "b")
    assert torch.equal(logits(model), logits(twin))
    functional.set_requires_grad(model, "a")
    functional.set_requires_grad(model, "b", False)
    assert {n.split(".adapters.")[1][0] for n, p in model.named_parameters() if p.requires_grad} == {"a"}
    assert functional.delete_adapter(model, "b", prefix="lora_") == ["a"]
    assert functional.delete_adapter(model, "a") is None
