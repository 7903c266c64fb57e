"""BOFT: products of permuted block-diagonal rotations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import PeftModel, Refusal, get_peft_model
from peft.methods.boft import BOFTConfig
from tests.helpers.one_layer import adapted


def test_boft_is_the_product_of_its_permuted_block_diagonal_factors():
    model, m = adapted(BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["site"]))
    W = model.base_model.model.site.base_layer.weight.detach().clone()
    B = torch.eye(16)
    for i, blocks in enumerate(m.boft_R_weight.detach()):
        # factor i joins the half-blocks (2 channels) of 2^i neighbouring blocks: even halves first, then odd ones
        halves = [list(range(2 * h, 2 * h + 2)) for h in range(8)]
        order = []
        for start in range(0, 8, 2 ** (i + 1)):
            group = halves[start : start + 2 ** (i + 1)]
            order += [c for h in (*group[0::2], *group[1::2]) for c in h] if i else [c for h in group for c in h]
        P = torch.zeros(16, 16)
        P[torch.arange(16), torch.tensor(order)] = 1
        A = [(R - R.T) / 2 for R in blocks]
        D = torch.block_diag(*((torch.eye(4) - a) @ torch.linalg.inv(torch.eye(4) + a) for a in A))
        B = P @ D @ P.T @ B
    torch.testing.assert_close(B @ B.T, torch.eye(16), atol=1e-5, rtol=0)
    merged = model.base_model.merge_and_unload().site.weight.detach()
    torch.testing.assert_close(merged, m.boft_s_weight.detach()[:, None] * (W @ B.T), atol=1e-5, rtol=0)
    reach = (B.abs() > 1e-6).sum()
    one, single = adapted(BOFTConfig(boft_block_size=4, target_modules=["site"]))
    assert reach > 16 * 4 and (single.rotate(torch.eye(16)).abs() > 1e-6).sum() <= 16 * 4


def test_boft_refuses_sizes_that_do_not_fit_before_anything_changes():
    base = nn.Sequential()
    base.site = nn.Linear(18, 8)
    for config, why in (
        (BOFTConfig(boft_block_size=4, target_modules=["site"]), r"18 must be divisible by boft_block_size \(4\)"),
        (BOFTConfig(boft_block_size=6, boft_n_butterfly_factor=2, target_modules=["site"]), "butterfly factors need"),
    ):
        with pytest.raises(Refusal, match=why):
            get_peft_model(base, config)
        assert type(base.site) is nn.Linear and base.site.weight.requires_grad


def test_boft_reads_the_single_factor_that_upstream_saves_without_a_cuda_compiler(tmp_path):
    one, _ = adapted(BOFTConfig(boft_block_size=4, target_modules=["site"]))
    one.peft_config["default"].boft_n_butterfly_factor = 2
    one.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = nn.Sequential()
    base.site = nn.Linear(16, 24)
    x = torch.randn(3, 16)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(x), one(x))
