"""BitFit trains biases and nothing else."""

from __future__ import annotations

import pytest

from peft import NoMatchingPeftModuleError, Refusal, get_peft_model
from peft.methods.bitfit import BitFitConfig
from tests.helpers.selective import llama


def test_bitfit_trains_every_bias_and_only_biases():
    base = llama()
    expected = sum(p.numel() for n, p in base.named_parameters() if n.endswith("bias"))
    model = get_peft_model(base, BitFitConfig())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert set(model.peft_config["default"].target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(NoMatchingPeftModuleError, match="no module of this model has one"):
        get_peft_model(llama(bias=False), BitFitConfig())
    with pytest.raises(Refusal, match="no bias that could be trained"):
        get_peft_model(llama(), BitFitConfig(target_modules=["down_proj"]))
