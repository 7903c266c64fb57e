"""Functions on whole models."""

from __future__ import annotations

import torch

import peft
from peft import get_peft_model
from tests.helpers.tiny_llama import llama, lora


def test_mixed_precision_casts_the_frozen_part_only():
    model = get_peft_model(llama(), lora())
    peft.cast_mixed_precision_params(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
