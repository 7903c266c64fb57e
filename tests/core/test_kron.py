"""Kronecker products without forming them, and the factorisation of sizes."""

from __future__ import annotations

import pytest
import torch

from peft.maths.kron import apply_kron, factorization, kron


def test_kronecker_products_without_forming_them():
    A, B, x = torch.randn(3, 4), torch.randn(5, 2), torch.randn(6, 8)
    assert torch.allclose(kron(A, B), torch.kron(A, B))
    assert torch.allclose(apply_kron(x, A, B), x @ torch.kron(A, B).T, atol=1e-5)


@pytest.mark.parametrize("n", [1, 12, 16, 127, 128, 360])
def test_factorization_takes_the_nearest_divisors(n):
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    assert factorization(n) == next((d, n // d) for d in reversed(divisors) if d * d <= n)
    for limit in (2, 5, 40):
        m, k = factorization(n, limit)
        small = limit if n % limit == 0 else max(d for d in divisors if d <= limit and d * d <= n)
        assert (m, k) == (small, n // small)
