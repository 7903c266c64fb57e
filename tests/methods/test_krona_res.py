"""KronA beside a block, with its learned residual."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import Refusal, get_peft_model
from peft.methods.krona_res import KronAResConfig
from tests.helpers.additive import base, method, noised


def test_krona_res_runs_beside_a_block():
    block = nn.Sequential(nn.Linear(12, 30), nn.GELU(), nn.Linear(30, 12))
    net = nn.Sequential()
    net.add_module("ffn", block)
    x = torch.randn(5, 12)
    plain = block(x)
    model = noised(get_peft_model(net, KronAResConfig(target_modules=["ffn"], scale=2.0, residual=1.0)))
    m = method(model, "ffn")
    expected = plain + 2 * x @ torch.kron(m.krona_A_weight, m.krona_B_weight).T + m.krona_residual_weight * x
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert abs(m.krona_residual_weight.item() - 1) < 0.9  # it started where the config says
    with pytest.raises(Refusal, match="12 and 24 channels"):
        get_peft_model(base(), KronAResConfig(target_modules=["lin1"]))
