"""Dropout of a whole ΔW and of its rows."""

from __future__ import annotations

import pytest
import torch

import peft
from tests.helpers.additive import make


@pytest.mark.parametrize("config", [peft.LoHaConfig, peft.LoKrConfig])
def test_rank_dropout_drops_rows_and_module_dropout_all(config):
    rows = make(config(r=2, rank_dropout=0.5, target_modules=["lin1"]))
    layer, x = rows.base_model.model.lin1, torch.randn(3, 12)
    whole, plain = layer(x), layer.base_layer(x)
    ratio = (layer.train()(x) - plain) / (whole - plain)
    dropped = (ratio.abs() < 1e-3).all(0)
    assert dropped.any() and not dropped.all()
    kept = ratio[:, ~dropped]
    grown = 24 / int((~dropped).sum()) if config is peft.LoHaConfig else 1.0
    assert torch.allclose(kept, torch.full_like(kept, grown), rtol=1e-2)
    layer = make(config(r=2, module_dropout=0.5, target_modules=["lin1"])).base_model.model.lin1
    off = [torch.equal(layer.train()(x), layer.base_layer(x)) for _ in range(40)]
    assert 5 < sum(off) < 35
