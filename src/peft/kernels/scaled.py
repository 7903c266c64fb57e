"""y = c ⊙ (x Wᵀ + s·x Aᵀ Bᵀ) + b as one autograd node: a low-rank change whose rows are scaled, as DoRA has it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dropout
from .lowrank import add_term
from .node import Context, again, as_output, column_sums, matrix
from .terms import Thin


def scaled_linear(x: Tensor, W: Tensor, b: Tensor | None, term: Thin, p: float = 0.0) -> Tensor:
    """c ⊙ (x Wᵀ + s·x Aᵀ Bᵀ) + b with the row factors c[n] of the term: DoRA for the price of one base product.

    p: dropout, which acts on the change alone, y = x Wᵀ + b + (c − 1) ⊙ x̃ Wᵀ + c ⊙ s·x̃ Aᵀ Bᵀ with x̃ = drop(x), and
    takes a second base product.
    """
    assert term.rows is not None
    return _Scaled.apply(x, W, b, term.scale, p, term.A, term.B, term.rows.to(x.dtype))


class Held(Context, Protocol):
    s: float
    p: float
    seed: int


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Held, x: Tensor, W: Tensor, b: Tensor | None, s: float, p: float, A: Tensor, B: Tensor, c: Tensor
    ) -> Tensor:
        x2 = matrix(x)
        xs, bits, seed, k = dropout.drop(x2, p)
        z2 = F.linear(xs, W)
        y = F.linear(x, W, b) if p else None
        if y is not None:
            y.view(z2.shape).add_(z2, alpha=-k)
        h, *_ = add_term(xs, z2, A.to(x.dtype), B.to(x.dtype), s, 0.0, None)
        if y is not None:
            y.view(z2.shape).addcmul_(z2, c, value=k)
        else:
            y = (z2 * c if b is None else torch.addcmul(b, z2, c)).view(*x.shape[:-1], len(W))
        ctx.save_for_backward(x, W, A, B, c, h, z2, bits)
        ctx.s, ctx.p, ctx.seed = s, p, seed
        return as_output(y)

    @staticmethod
    def backward(ctx: Held, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, W, A, B, c, h, z2, bits = ctx.saved_tensors
        needs, x2 = ctx.needs_input_grad, matrix(x)
        keep, k = dropout.kept(x2, ctx.p, bits, ctx.seed)
        if torch.is_grad_enabled():

            def formula(x: Tensor, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
                dropped = x if keep is None else k * dropout.dropped(x, keep.view(x.shape))
                thin = ctx.s * F.linear(F.linear(dropped, A.to(x.dtype)), B.to(x.dtype))
                return F.linear(x, W) + (c - 1) * F.linear(dropped, W) + c * thin

            return again(formula, (x, A, B, c), needs, dy)
        dy2 = matrix(dy)
        g = dy2 * c
        dc = column_sums(dy2 * z2).mul_(k) if needs[7] else None
        dB = (g.T @ h).mul_(ctx.s * k) if needs[6] else None
        dA = dx = None
        if needs[0] or needs[5]:
            dh = (g @ B.to(x.dtype)).mul_(ctx.s * k)
            if needs[5]:
                dA = dh.T @ (x2 if keep is None else dropout.dropped(x2, keep))
            if needs[0] and keep is None:
                dx = (g @ W).addmm_(dh, A.to(x.dtype))
            elif needs[0] and keep is not None:
                inner = (g.sub_(dy2).mul_(k) @ W).addmm_(dh, A.to(x.dtype))
                dx = (dy2 @ W).add_(dropout.dropped(inner, keep))
        return None if dx is None else dx.view(x.shape), None, None, None, None, dA, dB, dc
