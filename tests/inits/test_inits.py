"""Starts from the weight, which leave it alone."""

from __future__ import annotations

import pytest
import torch

import peft
from peft import get_peft_model
from tests.helpers.additive import base, method


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_8", "olora"])
def test_starts_from_the_weight_leave_it_untouched(start):
    net = base()
    W = net.lin1.weight.detach().clone()
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=start, target_modules=["lin1"])
    m = method(get_peft_model(net, config))
    assert torch.equal(net.lin1.base_layer.weight, W)
    product = 2 * m.lora_B_weight @ m.lora_A_weight
    if start == "olora":
        Q, R = torch.linalg.qr(W)
        assert torch.allclose(m.lora_B_weight, Q[:, :3]) and torch.allclose(m.lora_A_weight, R[:3])
    else:
        U, S, V = torch.linalg.svd(W)
        best = (U[:, :3] * S[:3]) @ V[:3]
        assert torch.allclose(product, best, atol=1e-3 if "niter" in start else 1e-5)
    assert float(m.dense().detach().abs().max()) < 1e-6


def test_unknown_starts_name_the_known_ones():
    with pytest.raises(ValueError, match="pissa"):
        peft.LoraConfig(init_lora_weights="pisa", target_modules=["lin1"])
    with pytest.raises(ValueError, match="pissa_niter_"):
        peft.LoraConfig(init_lora_weights="pissa_niter_many", target_modules=["lin1"])
