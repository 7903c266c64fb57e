"""Kronecker products: choosing factor sizes, and applying A ⊗ B without forming it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..contract.geometry import Geometry


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


def apply_kron(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """(A ⊗ B) x over the last axis of x, in two small products: with x as a matrix X[a2, b2] it is A X Bᵀ."""
    X = x.reshape(*x.shape[:-1], A.shape[1], B.shape[1])
    return (A @ X @ B.T).flatten(-2)


def plain(geometry: Geometry) -> bool:
    """Whether the layer is one matrix on the last axis of its input, so that `apply_kron` stands for `op`."""
    return geometry.pointwise and not geometry.shape
