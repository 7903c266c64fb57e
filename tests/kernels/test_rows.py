"""Rows with terms of their own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from peft.kernels.lowrank import lowrank_linear
from peft.kernels.rows import Scratch, rows_linear
from peft.kernels.terms import Thin
from tests.helpers.lowrank import setting


def test_rows_may_have_terms_of_their_own():
    x, W, b, factors = setting(batch=(6,), ranks=(2, 3, 1))
    where = [slice(0, 2), torch.tensor([4, 2]), slice(3, 4)]
    leaves = [x, *(t for pair in factors for t in pair)]
    fused = lowrank_linear(x, W, b, [Thin(A, B, 0.5) for A, B in factors], where=where)
    plain = F.linear(x, W, b)
    for (A, B), at in zip(factors, where, strict=True):
        one = torch.zeros(6, 1, dtype=x.dtype)
        one[at] = 0.5
        plain = plain + one * F.linear(F.linear(x, A), B)
    assert torch.allclose(fused, plain, atol=1e-12)
    g = torch.randn_like(plain)
    for a, e in zip(torch.autograd.grad(fused, leaves, g), torch.autograd.grad(plain, leaves, g), strict=True):
        assert torch.allclose(a, e, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(lowrank_linear(x, W, b, [Thin(A, B, 0.5) for A, B in factors], where=where), plain)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("each", [1, 3])
def test_equal_shares_of_the_rows_run_together(each, first):
    """Adapters of neighbouring rows, all with equally many; rows before and after them have none."""
    x, W, b, factors = setting(batch=(first + 3 * each + 1,), ranks=(2, 2, 2))
    where = [slice(first + i * each, first + (i + 1) * each) for i in range(3)]
    terms = [Thin(A, B, 0.5) for A, B in factors]
    leaves = [x, *(t for pair in factors for t in pair)]
    together, plain = rows_linear(x, W, b, terms, where, None, Scratch()), lowrank_linear(x, W, b, terms, where=where)
    assert together is not None and torch.allclose(together, plain, atol=1e-12)
    g = torch.randn_like(plain)
    for a, e in zip(torch.autograd.grad(together, leaves, g), torch.autograd.grad(plain, leaves, g), strict=True):
        assert torch.allclose(a, e, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(rows_linear(x, W, b, terms, where, None, Scratch()), plain, atol=1e-12)


def test_other_shares_do_not_run_together():
    x, W, b, factors = setting(batch=(6,), ranks=(2, 2))
    for where in (
        [slice(0, 2), slice(2, 5)],
        [slice(0, 2), slice(3, 5)],
        [slice(2, 4), slice(0, 2)],
        [slice(0, 2), torch.tensor([2, 4])],
    ):
        assert rows_linear(x, W, b, [Thin(*f) for f in factors], where, None, Scratch()) is None
    assert rows_linear(x, W, b, [], [], None, Scratch()) is None  # all rows run as the base
    even = [slice(0, 2), slice(2, 4)]
    (A, B), (C, D) = factors
    assert rows_linear(x, W, b, [Thin(A, B), Thin(C, D, 2.0)], even, None, Scratch()) is None
    assert rows_linear(x, W, b, [Thin(A, B), Thin(C[:1], D[:, :1])], even, None, Scratch()) is None
