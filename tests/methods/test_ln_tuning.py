"""LayerNorm tuning trains the norms alone."""

from __future__ import annotations

import torch

from peft import get_peft_model
from peft.methods.ln_tuning import LNTuningConfig
from tests.helpers.selective import IDS, bits, llama, train


def test_layernorm_tuning_trains_the_norms_alone():
    model = get_peft_model(llama(), LNTuningConfig())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 5 * 16  # two norms in each of two layers and the last one
    before = bits(model.get_base_model())
    train(model, lambda m: m(IDS, labels=IDS).loss)
    after = model.get_base_model().state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if "ln_tuning" not in k)
    assert all(not torch.equal(after[k], v) for k, v in before.items() if "ln_tuning" in k)
