"""PHM layers against sums of Kronecker products."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from peft.methods.phm import PhmConfig
from tests.helpers.activation import on_layer


def test_phm_matrices_are_sums_of_kronecker_products():
    layer, x = nn.Linear(8, 16), torch.randn(2, 8)
    model, m = on_layer(layer, PhmConfig(target_modules=["site"], bottleneck_size=8, phm_dim=4))
    down = sum(torch.kron(m.adapter_down_A[i], m.adapter_down_B[i]) for i in range(4))
    up = sum(torch.kron(m.adapter_up_A[i], m.adapter_up_B[i]) for i in range(4))
    y = layer(x)
    z = F.gelu(y @ down.T + m.adapter_down_bias)
    assert down.shape == (8, 16)
    assert torch.allclose(model(x), y + z @ up.T + m.adapter_up_bias, atol=1e-5)
