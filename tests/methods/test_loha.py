"""LoHa against its formula."""

from __future__ import annotations

import torch

from peft.methods.loha import LoHaConfig
from tests.helpers.additive import make, method


def test_loha_is_a_hadamard_product():
    m = method(make(LoHaConfig(r=3, alpha=6, target_modules=["lin1"])))
    expected = 2 * (m.hada_w1_a_weight @ m.hada_w1_b_weight) * (m.hada_w2_a_weight @ m.hada_w2_b_weight)
    assert torch.allclose(m.dense(), expected)
    assert torch.linalg.matrix_rank(m.dense()) == m.rank() == 9
