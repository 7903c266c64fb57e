"""The `bias` field: copies of biases beside a method."""

from __future__ import annotations

import pytest
import torch

from peft import LoraConfig, get_peft_model
from tests.helpers.selective import IDS, bits, llama, same, train


@pytest.mark.parametrize(("bias", "trained"), [("none", 0), ("all", 2 * (16 + 8 + 8 + 16)), ("lora_only", 2 * 16)])
def test_the_bias_field_trains_copies_of_biases(bias, trained):
    base = llama()
    before, expected = bits(base), base(IDS).logits
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], bias=bias))
    extra = [p for n, p in model.named_parameters() if p.requires_grad and "bitfit" in n]
    assert sum(p.numel() for p in extra) == trained
    train(model, lambda m: m(IDS, labels=IDS).loss)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
    assert same(model.base_model.unload(), before)
