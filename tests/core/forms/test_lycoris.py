"""Dropout of a whole ΔW and of its rows."""

from __future__ import annotations

import itertools

import pytest
import torch

import peft
from peft.core.forms.lycoris import kaiming
from peft.maths.tucker import tucker
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


def test_a_tucker_core_is_summed_over_both_of_its_axes():
    """Σᵢⱼ core[i, j, taps] a[i, out] b[j, inputs], entry by entry."""
    core, a, b = torch.randn(2, 3, 2, 2), torch.randn(2, 4), torch.randn(3, 5)
    found = tucker(core, a, b)
    assert found.shape == (4, 5 * 4)
    for out, inp, tap in itertools.product(range(4), range(5), range(4)):
        terms = (core.flatten(2)[i, j, tap] * a[i, out] * b[j, inp] for i in range(2) for j in range(3))
        assert abs(found[out, inp * 4 + tap] - sum(terms)) < 1e-5


def test_kaiming_draws_within_one_over_the_root_of_fan_in():
    drawn = torch.empty(200, 25)
    kaiming(drawn, torch.Generator().manual_seed(0))
    assert 0.19 < drawn.abs().max() <= 0.2 and abs(drawn.mean()) < 0.01
