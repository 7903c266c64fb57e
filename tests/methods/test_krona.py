"""KronA against its formula."""

from __future__ import annotations

import pytest
import torch

from peft import get_peft_model
from peft.methods.krona import KronAConfig
from tests.helpers.additive import base, make, method


def test_krona_is_a_scaled_kronecker_product():
    m = method(make(KronAConfig(a_shape=(4, 6), scale=1.5, target_modules=["lin1"])))
    assert m.krona_A_weight.shape == (4, 6) and m.krona_B_weight.shape == (6, 2)
    assert torch.allclose(m.dense(), 1.5 * torch.kron(m.krona_A_weight, m.krona_B_weight))
    with pytest.raises(ValueError, match="does not divide the layer lin1, which is 24 x 12"):
        get_peft_model(base(), KronAConfig(a_shape=(5, 2), target_modules=["lin1"]))
