"""OFT: rotations by Cayley transforms, in blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from peft import BOFTConfig, Refusal
from peft.methods.oft import OFTConfig
from tests.helpers.one_layer import adapted


def test_oft_cayley_blocks_are_orthogonal_and_sit_on_the_diagonal():
    model, m = adapted(OFTConfig(r=4, oft_block_size=0, use_cayley_neumann=False, target_modules=["site"]))
    W = model.base_model.model.site.base_layer.weight.detach().clone()
    R = torch.zeros(16, 16)
    for i, q in enumerate(m.oft_R_weight.detach()):
        Q, k = torch.zeros(4, 4), 0
        for row in range(4):
            for col in range(row + 1, 4):
                Q[row, col], Q[col, row] = q[k], -q[k]
                k += 1
        R[4 * i : 4 * i + 4, 4 * i : 4 * i + 4] = (torch.eye(4) - Q) @ torch.linalg.inv(torch.eye(4) + Q)
    torch.testing.assert_close(R @ R.T, torch.eye(16), atol=1e-5, rtol=0)
    merged = model.base_model.merge_and_unload().site.weight
    torch.testing.assert_close(merged.detach(), W @ R.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(merged.norm(dim=1), W.norm(dim=1), atol=1e-5, rtol=0)


def test_the_neumann_series_approaches_the_inverse_and_turns_the_other_way():
    exact = OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["site"])
    errors = []
    for terms in (3, 5, 9):
        series = OFTConfig(oft_block_size=4, num_cayley_neumann_terms=terms, target_modules=["site"])
        (_, a), (_, b) = adapted(exact, noise=0.05), adapted(series, noise=0.05)
        errors.append(float((a.rotations().mT - b.rotations()).abs().max().detach()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-5


def test_oft_takes_one_of_the_two_sizes_and_adjusts_what_does_not_divide():
    for wrong in ({"r": 4, "oft_block_size": 4}, {"r": 0, "oft_block_size": 0}):
        with pytest.raises(ValueError, match="either r .* or oft_block_size"):
            OFTConfig(**wrong)
    with pytest.warns(UserWarning, match="oft_block_size=7 does not divide 16; 8 is used"):
        _, m = adapted(OFTConfig(oft_block_size=7, target_modules=["site"]))
    assert (m.number, m.size, tuple(m.oft_R_weight.shape)) == (2, 8, (2, 28))


def test_oft_refuses_blocks_that_cannot_rotate():
    with pytest.raises(Refusal, match="blocks of size 1 cannot rotate"):
        adapted(OFTConfig(oft_block_size=3, target_modules=["site"]), nn.Linear(7, 5))


def test_coft_pulls_every_block_back_into_its_ball():
    model, m = adapted(OFTConfig(oft_block_size=4, coft=True, eps=0.2, target_modules=["site"]))
    x, radius = torch.randn(3, 16), 0.2 / math.sqrt(4)
    free = m.oft_R_weight.detach().clone()
    model(x)
    assert torch.equal(m.oft_R_weight, free)  # evaluation reads, it does not write
    skew = m.constrained().detach()
    assert (math.sqrt(2) * skew.norm(dim=1) <= radius * 1.001).all()
    torch.testing.assert_close(skew, free * (radius / (math.sqrt(2) * free.norm(dim=1, keepdim=True))))
    model.train()
    model(x).sum().backward()
    assert (math.sqrt(2) * m.oft_R_weight.detach().norm(dim=1) <= radius * 1.001).all()
    assert m.oft_R_weight.grad is not None


@pytest.mark.parametrize(
    "config",
    [
        OFTConfig(oft_block_size=4, module_dropout=0.5, target_modules=["site"]),
        BOFTConfig(boft_block_size=4, boft_dropout=0.5, target_modules=["site"]),
    ],
    ids=["oft", "boft"],
)
def test_multiplicative_dropout_leaves_out_whole_blocks_and_only_in_training(config):
    model, m = adapted(config, nn.Linear(16, 16, bias=False))
    with torch.no_grad():
        layer = model.base_model.model.site
        if hasattr(m, "boft_s_weight"):
            m.boft_s_weight.fill_(1)
        layer.base_layer.weight.copy_(torch.eye(16))
        eye = torch.eye(16)
        full = model(eye)
        assert torch.equal(model(eye), full)
        model.train()
        for _ in range(3):
            changed = [
                not torch.allclose(model_block, torch.eye(4), atol=1e-5)
                for out in [model(eye)]
                for model_block in (out[i : i + 4, i : i + 4] for i in range(0, 16, 4))
            ]
            assert sum(changed) == 2
