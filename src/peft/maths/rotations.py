"""Orthogonal matrices: made from unconstrained numbers, and applied to rows without being formed.

Everything acts on the last axis of x[..., n], as a row vector does: the result is x M. What makes a rotation or applies
one computes in fp32 or fp64 and gives that, whatever the dtype of its inputs and whatever autocast says: rounded to half
precision a rotation is none, and the solvers know no such dtypes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def in_full_precision(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function of its tensors in the widest of their dtypes, fp32 at least, and without autocast."""

    @functools.wraps(function)
    def wide(*args: Any) -> Tensor:
        dtype, device = torch.float32, args[0].device.type
        if any(isinstance(a, Tensor) and a.dtype is not dtype for a in args):
            for a in args:
                dtype = torch.promote_types(dtype, a.dtype) if isinstance(a, Tensor) else dtype
            args = tuple(a.to(dtype) if isinstance(a, Tensor) else a for a in args)
        if not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return wide


# -- from skew-symmetric matrices to rotations --------------------------------------------------------------------------
def skew_symmetric(upper: Tensor, size: int) -> Tensor:
    """Q[k, b, b] with Qᵀ = −Q, from the entries above the diagonals, row by row: upper[k, b(b−1)/2], b = size."""
    Q = upper.new_zeros(upper.shape[0], size, size)
    row, col = torch.triu_indices(size, size, 1, device=upper.device)
    Q = Q.index_put((torch.arange(len(Q), device=upper.device)[:, None], row, col), upper)
    return Q - Q.transpose(-1, -2)


def ball_factors(upper: Tensor, radius: float) -> Tensor:
    """[k, 1]: what to multiply upper[k, b(b−1)/2] by so that every ‖Q‖ (Frobenius) is at most `radius`; 1 inside."""
    norm = math.sqrt(2) * upper.detach().norm(dim=1, keepdim=True)  # every number stands in Q twice
    return torch.where(norm <= radius * (1 + 1e-6), 1.0, radius / norm)


@in_full_precision
def cayley(Q: Tensor) -> Tensor:
    """R = (I − Q)(I + Q)⁻¹ of skew-symmetric Q[..., b, b]: orthogonal, det R = 1, and no eigenvalue is −1 (Cayley 1846)."""
    eye = identity_like(Q)
    return torch.linalg.solve(eye + Q, eye - Q, left=False)


@in_full_precision
def cayley_neumann(Q: Tensor, terms: int) -> Tensor:
    """R = I + 2Q + 2Q² + … + 2Qⁿ⁻² + Qⁿ⁻¹ of Q[..., b, b], n = terms (arXiv 2506.19847).

    Where ‖Q‖ < 1, (I − Q)⁻¹ is Σ Qᵏ; R is I + Q times that series up to Qⁿ⁻². It tends to (I + Q)(I − Q)⁻¹, which is
    the inverse of `cayley(Q)`, and falls short of it by the factor I − Qⁿ⁻¹. n = 1 and 2 are I and I + 2Q, and n = 3
    gives what n = 4 gives.
    """
    R, power = identity_like(Q), Q
    if terms > 1:
        R = R + 2 * Q
    if terms > 2:
        for _ in range(max(terms - 3, 1)):
            power = power @ Q
            R = R + 2 * power
        R = R + power @ Q
    return R


def identity_like(matrices: Tensor) -> Tensor:
    """I for each of the matrices[..., b, b]: a view."""
    return torch.eye(matrices.shape[-1], device=matrices.device, dtype=matrices.dtype).expand_as(matrices)


# -- block-diagonal factors and butterflies -----------------------------------------------------------------------------
def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n that is nearest to a number; of two the smaller."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))


def leave_out(blocks: Tensor, share: float) -> Tensor:
    """blocks[k, b, b] of which a share (rounded down, drawn from torch's generator) is I; for a product of m factors,
    blocks[m, k, b, b], blocks of one of them."""
    k = blocks.shape[-3]
    count = int(share * k)
    if not count:
        return blocks
    gone = (torch.randperm(k, device=blocks.device) < count)[:, None, None]
    if blocks.dim() > 3:
        factor = torch.randint(len(blocks), (1,), device=blocks.device)
        gone = gone & (torch.arange(len(blocks), device=blocks.device)[:, None, None, None] == factor)
    return torch.where(gone, identity_like(blocks), blocks)


@in_full_precision
def rotate_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """x blockdiag(blocks) for x[..., n] and blocks[n/b, b, b], or [1, b, b]: one for all."""
    b = blocks.shape[-1]
    parts = x.unflatten(-1, (x.shape[-1] // b, b))
    return torch.einsum("...nk,nkc->...nc", parts, blocks.expand(parts.shape[-2], -1, -1)).flatten(-2)


def butterfly_places(n: int, block_size: int, level: int, device: torch.device) -> Tensor:
    """The place [n] of each channel where level i of a butterfly is block-diagonal.

    Of every run of 2·2ⁱ half-blocks (b/2 channels each) the first 2ⁱ take the even places and the others the odd ones,
    so half-blocks that lie 2ⁱ apart share a block. Needs an even b, and n a multiple of 2ⁱ·b.
    """
    return torch.arange(n, device=device).view(-1, 2**level, 2, block_size // 2).transpose(1, 2).reshape(n)


@in_full_precision
def butterfly(x: Tensor, factors: Tensor) -> Tensor:
    """x Bᵀ with B = B_{m−1} … B₁ B₀ for x[..., n] and factors[m, n/b, b, b] (arXiv 2311.06243).

    B_i = P_i blockdiag(factors[i]) P_iᵀ with (P_i z)_c = z_p, p = `butterfly_places(…, i)[c]`, and P₀ = I. With
    orthogonal blocks B is orthogonal, and with m = 1 + log₂(n/b) factors every output depends on every input.
    """
    n, b = x.shape[-1], factors.shape[-1]
    for level, blocks in enumerate(factors):
        if level == 0:
            x = rotate_blocks(x, blocks.transpose(-1, -2))
        else:
            places = butterfly_places(n, b, level, x.device)
            x = rotate_blocks(x[..., torch.argsort(places)], blocks.transpose(-1, -2))[..., places]
    return x


# -- reflections --------------------------------------------------------------------------------------------------------
@in_full_precision
def compact_wy(U: Tensor) -> Tensor:
    """T[r, r], upper triangular, with H₁ H₂ … H_r = I − U T Uᵀ for H_i = I − 2 u_i u_iᵀ and unit columns U[n, r].

    T⁻¹ = I/2 + the strict upper triangle of UᵀU (Schreiber and Van Loan 1989; Joffrain et al. 2006).
    """
    eye = torch.eye(U.shape[1], device=U.device, dtype=U.dtype)
    return torch.linalg.solve_triangular(eye / 2 + torch.triu(U.T @ U, 1), eye, upper=True)


@in_full_precision
def reflect(x: Tensor, u: Tensor) -> Tensor:
    """x (H₁ H₂ … H_r)ᵀ with H_i = I − 2 u_i u_iᵀ/‖u_i‖² for x[..., n] and columns u[n, r]: two thin products."""
    U = u / u.norm(dim=0)
    T = compact_wy(U)
    return x - (x @ U) @ (T.T @ U.T)


@in_full_precision
def reflect_orthonormalised(x: Tensor, u: Tensor) -> Tensor:
    """`reflect` by the columns that Gram-Schmidt makes of u[n, r], r <= n: x (I − 2 Q Qᵀ), Q their orthonormal basis."""
    Q = torch.linalg.qr(u).Q
    return x - 2 * (x @ Q) @ Q.T


# -- orthonormal rows ---------------------------------------------------------------------------------------------------
@in_full_precision
def orthonormal_rows(V: Tensor) -> Tensor:
    """R[..., r, n] with R Rᵀ = I and V = L R, L lower triangular with a positive diagonal, for V[..., r, n], r <= n.

    The thin QR of Vᵀ. The signs make R unique and continuous where V has full rank, and R = V where V
    has orthonormal rows already.
    """
    Q, upper = torch.linalg.qr(V.transpose(-1, -2))
    signs = torch.where(torch.diagonal(upper, dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)
    return (Q * signs[..., None, :]).transpose(-1, -2)
