"""Kronecker products against their definition, entry by entry."""

from __future__ import annotations

import pytest
import torch

from peft.contract.geometry import Geometry
from peft.maths.kron import apply_kron, factorization, kron, kronecker_sum

A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
B = torch.tensor([[0.0, 5.0], [6.0, 7.0]])
# the blocks 1·B, 2·B above 3·B, 4·B
PRODUCT = torch.tensor([[0, 5, 0, 10], [6, 7, 12, 14], [0, 15, 0, 20], [18, 21, 24, 28]], dtype=torch.float32)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_a_product_holds_a_block_per_entry_of_the_left_factor():
    assert torch.equal(kron(A, B), PRODUCT)
    assert not torch.equal(kron(B, A), PRODUCT)
    left, right = drawn(2, 3), drawn(4, 5)
    full = kron(left, right)
    assert full.shape == (8, 15)
    for i in range(2):
        for j in range(3):
            assert torch.equal(full[4 * i : 4 * i + 4, 5 * j : 5 * j + 5], left[i, j] * right)


def test_the_rank_of_a_product_is_the_product_of_the_ranks():
    left, right = drawn(4, 1) @ drawn(1, 5), drawn(6, 3) @ drawn(3, 4)
    assert torch.linalg.matrix_rank(kron(left, right)) == 3


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_a_product_is_applied_without_being_formed(leading):
    left, right, x = drawn(2, 3), drawn(5, 4), drawn(*leading, 12)
    expected = torch.einsum("oi,...i->...o", torch.kron(left, right), x)
    assert torch.allclose(apply_kron(x, left, right), expected, atol=1e-12)
    assert torch.equal(apply_kron(torch.eye(4), A, B), PRODUCT.T)  # of every unit vector: the columns


def test_kronecker_products_without_forming_them():
    A, B, x = torch.randn(3, 4), torch.randn(5, 2), torch.randn(6, 8)
    assert torch.allclose(kron(A, B), torch.kron(A, B))
    assert torch.allclose(apply_kron(x, A, B), x @ torch.kron(A, B).T, atol=1e-5)


def test_a_sum_adds_the_products_one_by_one():
    lefts, rights = drawn(3, 2, 4), drawn(3, 5, 2)
    expected = sum(torch.kron(a, b) for a, b in zip(lefts, rights, strict=True))
    assert torch.allclose(kronecker_sum(lefts, rights), expected, atol=1e-12)
    assert kronecker_sum(lefts, rights).shape == (10, 8)
    assert torch.equal(kronecker_sum(torch.stack([A, -A]), torch.stack([B, B])), torch.zeros(4, 4))


def test_quaternions_multiply_by_a_sum_of_four_products():
    """The Hamilton product is the PHM matrix of n = 4 (arXiv 2102.08597, section 3.2): i j = k, i² = −1."""
    one, i, j, k = (
        torch.tensor(rows, dtype=torch.float32)
        for rows in (
            [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
            [[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1, 0]],
            [[0, 0, -1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, -1, 0, 0]],
            [[0, 0, 0, -1], [0, 0, -1, 0], [0, 1, 0, 0], [1, 0, 0, 0]],
        )
    )
    rule = torch.stack([one, i, j, k])
    q = torch.tensor([2.0, -1.0, 3.0, 5.0])
    left = kronecker_sum(rule, q.view(4, 1, 1))  # x -> q x
    assert torch.equal(left @ torch.tensor([1.0, 0, 0, 0]), q)
    assert torch.equal(
        left @ torch.tensor([0.0, 1, 0, 0]), torch.tensor([1.0, 2.0, 5.0, -3.0])
    )  # q i = 1 + 2i + 5j − 3k
    assert torch.equal(left.T @ left, q.square().sum() * torch.eye(4))


@pytest.mark.parametrize(
    ("dimension", "factor", "expected"),
    [
        (1, -1, (1, 1)),
        (12, -1, (3, 4)),
        (13, -1, (1, 13)),  # a prime
        (128, -1, (8, 16)),
        (250, -1, (10, 25)),
        (128, 4, (4, 32)),
        (128, 64, (64, 2)),  # divides, so it is taken although it is the larger one
        (36, 5, (4, 9)),
        (36, 100, (6, 6)),
        (360, 7, (6, 60)),
    ],
)
def test_factor_sizes(dimension, factor, expected):
    assert factorization(dimension, factor) == expected


@pytest.mark.parametrize("n", [1, 12, 16, 127, 128, 360])
def test_factorization_takes_the_nearest_divisors(n):
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    assert factorization(n) == next((d, n // d) for d in reversed(divisors) if d * d <= n)
    for limit in (2, 5, 40):
        m, k = factorization(n, limit)
        small = limit if n % limit == 0 else max(d for d in divisors if d <= limit and d * d <= n)
        assert (m, k) == (small, n // small)


def test_a_plain_matrix_is_told_from_kernels_tables_and_groups():
    """`apply_kron` stands for a layer's own product only where the layer is one matrix on the last axis."""
    assert Geometry(out=4, fan_in=6, inputs=6).is_matrix
    assert not Geometry(out=4, fan_in=6, inputs=6, shape=(1, 1)).is_matrix  # a 1x1 kernel: channels are not last
    assert not Geometry(out=4, fan_in=18, inputs=6, kernel=3, shape=(3,)).is_matrix
    assert not Geometry(out=4, fan_in=3, inputs=6, groups=2).is_matrix
    assert not Geometry(out=4, fan_in=10, inputs=4, indexed=True).is_matrix
