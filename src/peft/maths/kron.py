"""Kronecker products: choosing factor sizes, sums of products, and applying A ⊗ B without forming it.

(A ⊗ B)[i·b1 + k, j·b2 + l] = A[i, j] B[k, l] for A[a1, a2], B[b1, b2]; its rank is rank(A)·rank(B).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """`dimension = m·n` with m <= n.

    factor > 0: m is `factor` where that divides `dimension` (then m may exceed n), else the largest divisor up to it.
    factor = -1: the divisors nearest to the square root.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    root = math.isqrt(dimension)
    largest = root if factor == -1 else max(1, min(factor, root))
    m = next(d for d in range(largest, 0, -1) if dimension % d == 0)
    return m, dimension // m


def kron(A: Tensor, B: Tensor) -> Tensor:
    """A[a1, a2] ⊗ B[b1, b2] as a matrix [a1·b1, a2·b2]."""
    return torch.einsum("ij,kl->ikjl", A, B).reshape(A.shape[0] * B.shape[0], A.shape[1] * B.shape[1])


def kronecker_sum(A: Tensor, B: Tensor) -> Tensor:
    """Σ_i A_i ⊗ B_i of A[n, p, q] and B[n, r, s]: [p·r, q·s], the matrix of a PHM layer (arXiv 2102.08597)."""
    return torch.einsum("npq,nrs->prqs", A, B).reshape(A.shape[1] * B.shape[1], A.shape[2] * B.shape[2])


def apply_kron(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """(A ⊗ B) x over the last axis of x, in two small products: with x as a matrix X[a2, b2] it is A X Bᵀ."""
    X = x.reshape(*x.shape[:-1], A.shape[1], B.shape[1])
    return (A @ X @ B.T).flatten(-2)
