"""PHM layers against sums of Kronecker products; fields and sizes that make none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft import BottleneckConfig, CompacterConfig, LoReftConfig, PhmConfig, Refusal, get_peft_model
from tests.helpers.activation import Net, on_layer


def test_phm_matrices_are_sums_of_kronecker_products():
    layer, x = nn.Linear(8, 16), torch.randn(2, 8)
    model, m = on_layer(layer, PhmConfig(target_modules=["site"], bottleneck_size=8, phm_dim=4))
    down = sum(torch.kron(m.adapter_down_A[i], m.adapter_down_B[i]) for i in range(4))
    up = sum(torch.kron(m.adapter_up_A[i], m.adapter_up_B[i]) for i in range(4))
    y = layer(x)
    z = F.gelu(y @ down.T + m.adapter_down_bias)
    assert down.shape == (8, 16)
    assert torch.allclose(model(x), y + z @ up.T + m.adapter_up_bias, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: BottleneckConfig(variant="pfeifer"), "variant"),
        (lambda: BottleneckConfig(bottleneck_size=0), "bottleneck_size"),
        (lambda: BottleneckConfig(scaling="learnt"), "scaling"),
        (lambda: BottleneckConfig(non_linearity="step"), "non_linearity"),
        (lambda: BottleneckConfig(dropout=1.0), "dropout"),
        (lambda: PhmConfig(bottleneck_size=6, phm_dim=4), "bottleneck_size"),
        (lambda: CompacterConfig(phm_rank=0), "phm_rank"),
        (lambda: LoReftConfig(r=0), "r"),
        (lambda: LoReftConfig(variant="reft"), "variant"),
        (lambda: LoReftConfig(prefix_positions=0, suffix_positions=0), "prefix_positions"),
    ],
)
def test_bad_fields_are_named(make, field):
    with pytest.raises(ValueError, match=field):
        make()


def test_sizes_that_no_matrix_has_are_refused():
    with pytest.raises(Refusal, match="multiple of 4"):
        get_peft_model(Net(nn.Linear(8, 6)), PhmConfig(target_modules=["site"], bottleneck_size=4, phm_dim=4))
    with pytest.raises(Refusal, match="subspace"):
        get_peft_model(Net(nn.Linear(8, 6)), LoReftConfig(target_modules=["site"], r=7))
    with pytest.raises(Refusal, match="channels"):
        get_peft_model(Net(nn.Dropout()), BottleneckConfig(target_modules=["site"]))
