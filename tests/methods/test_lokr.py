"""LoKr against its formula and starts."""

from __future__ import annotations

import pytest
import torch

from peft import get_peft_model
from peft.methods.lokr import LoKrConfig
from tests.helpers.additive import base, make, method


def test_lokr_factors_are_low_rank_only_where_that_saves():
    m = method(make(LoKrConfig(r=1, alpha=3, decompose_both=True, target_modules=["lin1"])))
    w1, w2 = m.lokr_w1_a_weight @ m.lokr_w1_b_weight, m.lokr_w2_a_weight @ m.lokr_w2_b_weight
    assert w1.shape == (4, 3) and w2.shape == (6, 4)
    assert torch.allclose(m.dense(), 3 * torch.kron(w1, w2))
    assert method(make(LoKrConfig(r=3, target_modules=["lin1"]))).lokr_w2_weight.shape == (6, 4)


@pytest.mark.parametrize("start", [True, "lycoris", False])
def test_lokr_starts(start):
    model = get_peft_model(base(), LoKrConfig(r=1, init_weights=start, target_modules=["lin1"]))
    m = method(model)
    assert bool(m.dense().any()) is (start is False)
    assert bool((m.lokr_w1_weight == 0).all()) is (start is True)
