"""HRA: chains of Householder reflections."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import Refusal, get_peft_model
from peft.methods.hra import HRAConfig
from tests.helpers.one_layer import adapted


@pytest.mark.parametrize("gram_schmidt", [False, True])
def test_hra_is_a_chain_of_reflections(gram_schmidt):
    model, m = adapted(HRAConfig(r=4, apply_GS=gram_schmidt, target_modules=["site"]))
    W = model.base_model.model.site.base_layer.weight.detach().double()
    columns = m.hra_u_weight.detach().double().T
    if gram_schmidt:
        done: list[torch.Tensor] = []
        for u in columns:
            for v in done:
                u = u - (v @ u) * v
            done.append(u / u.norm())
        columns = torch.stack(done)
    chain = torch.eye(16, dtype=torch.float64)
    for u in columns:
        chain = chain @ (torch.eye(16) - 2 * torch.outer(u, u) / (u @ u))
    torch.testing.assert_close(chain @ chain.T, torch.eye(16, dtype=torch.float64))
    merged = model.base_model.merge_and_unload().site.weight.detach().double()
    torch.testing.assert_close(merged, W @ chain, atol=1e-6, rtol=0)


def test_hra_starts_as_the_identity_when_reflections_can_cancel():
    for r, same in ((4, True), (3, False)):
        torch.manual_seed(0)
        base = nn.Sequential()
        base.site = nn.Linear(16, 8)
        x = torch.randn(5, 16)
        before = base(x)
        if same:
            model = get_peft_model(base, HRAConfig(r=r, target_modules=["site"]))
        else:
            with pytest.warns(UserWarning, match="r=3 is odd"):
                model = get_peft_model(base, HRAConfig(r=r, target_modules=["site"]))
        assert torch.allclose(model(x), before, atol=1e-5) is same


def test_hra_refuses_more_orthogonal_directions_than_dimensions():
    with pytest.raises(Refusal, match="cannot be orthogonal in 16 dimensions"):
        adapted(HRAConfig(r=20, apply_GS=True, target_modules=["site"]))
