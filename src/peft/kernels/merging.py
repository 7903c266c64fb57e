"""W + Σ s·B A written out, in place or into a new tensor, and its row norms without writing it out."""

from __future__ import annotations

import torch
from torch import Tensor

from .node import recorded
from .terms import Thin

TILE = 2**18  # entries of W that are widened at a time


def merged(W: Tensor, terms: list[Thin]) -> Tensor:
    """W + Σ sᵢ·Bᵢ Aᵢ as a new tensor of W's dtype; half precision is added up in fp32, a tile at a time."""
    if not _wide(W):
        return merge_tiles(W, terms, torch.empty_like(W))
    first, *rest = terms
    out = torch.addmm(W, first.B.to(W.dtype), first.A.to(W.dtype), alpha=first.scale)
    for t in rest:
        out.addmm_(t.B.to(W.dtype), t.A.to(W.dtype), alpha=t.scale)
    return out


def merge_tiles(W: Tensor, terms: list[Thin], out: Tensor) -> Tensor:
    rows = max(1, TILE // max(1, W.shape[1]))
    factors = [(t.A.float(), t.B.float(), t.scale) for t in terms]
    work = torch.empty(min(rows, len(W)), *W.shape[1:], dtype=torch.float32, device=W.device)
    for i in range(0, W.shape[0], rows):
        tile = work[: len(W) - i].copy_(W[i : i + rows])
        for A, B, s in factors:
            tile.addmm_(B[i : i + rows], A, alpha=s)
        out[i : i + rows] = tile
    return out


@torch.no_grad()
def merge_(W: Tensor, terms: list[Thin]) -> bool:
    """The same in place; False, and W as it was, unless each finite entry of W is sure to stay so."""
    limits, bound = torch.finfo(W.dtype), 0.0
    for t in terms:
        bound += abs(t.scale) * len(t.A) * _largest(t.B) * _largest(t.A)  # no entry of s·B A is larger
    bound *= 2 if W.is_complex() else 1  # nor are two products of parts
    # less than half the step between the dtype's largest numbers rounds none of them to inf: W need not be looked at
    if not bound < limits.max * limits.eps / 4 and not bound + _largest(W) < limits.max / 2:
        return False
    if _wide(W):
        for t in terms:
            W.addmm_(t.B.to(W.dtype), t.A.to(W.dtype), alpha=t.scale)
    else:
        merge_tiles(W, terms, W)
    return True


def _largest(W: Tensor) -> float:
    W = torch.view_as_real(W) if W.is_complex() else W
    return max(abs(float(v)) for v in torch.aminmax(W)) if W.numel() else 0.0


def _wide(W: Tensor) -> bool:
    return W.dtype in (torch.float32, torch.float64) or W.is_complex()


def row_norms(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """‖W + s·B A‖ of each row, in fp32 at least, without forming the sum:

        ‖w + s·b A‖² = ‖w‖² + 2s·(W Aᵀ)·b + s²·b (A Aᵀ) bᵀ.

    Rows that nearly cancel lose their digits this way; they are computed from the sum.
    """
    wide = torch.promote_types(A.dtype, torch.float32)
    A, B = A.to(wide), B.to(wide) * s
    if recorded() and not torch.compiler.is_compiling():
        return torch.linalg.vector_norm(W.to(wide) + B @ A, dim=1)
    own = torch.linalg.vector_norm(W, dim=1, dtype=wide).square()
    cross = (W @ A.to(W.dtype).T).to(wide)
    change = ((B @ (A @ A.T)) * B).sum(1)
    square = own + 2 * (cross * B).sum(1) + change
    if not torch.compiler.is_compiling() and not (W.is_cuda and torch.cuda.is_current_stream_capturing()):
        weak = square < 1e-2 * (own + change)
        if weak.any():
            exact = W[weak].to(wide) + B[weak] @ A
            square[weak] = exact.square().sum(1)
    return square.clamp_(min=0).sqrt_()
