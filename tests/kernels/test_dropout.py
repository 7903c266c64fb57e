"""Packed dropout masks."""

from __future__ import annotations

import pytest
import torch

from peft.kernels import dropout
from tests.helpers.lowrank import CPU, mask


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_the_mask_keeps_the_expected_share_and_mean(p):
    m = mask((1000, 400), p, 3)
    five_sigma = 5 * (p * (1 - p) / m.numel()) ** 0.5
    assert abs(float((m > 0).double().mean()) - (1 - p)) < five_sigma + 1 / 32768
    assert abs(float(m.double().mean()) - 1) < five_sigma / (1 - p) + 1e-4
    assert len(m.unique()) == 2
    assert not torch.equal(m, mask((1000, 400), p, 4))


def test_neighbouring_mask_entries_are_independent():
    m = (mask((400_000,), 0.5, 7) > 0).float() - 0.5
    for lag in (1, 2, 3, 4, 8):
        assert abs(float((m[lag:] * m[:-lag]).mean())) < 5 * 0.25 / 400_000**0.5


@pytest.mark.parametrize("shape", [(1,), (7, 3), (16, 16)])
def test_packed_masks_come_back(shape):
    keep = dropout.draw(torch.Size(shape), 0.3, 5, CPU)
    bits = dropout.pack(keep)
    assert bits.nbytes == -(-keep.numel() // 8) and torch.equal(dropout.unpack(bits, keep.shape), keep)
