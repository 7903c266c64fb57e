"""y = x Wᵀ + b + s·((x Aᵀ ⊙ d) Bᵀ) ⊙ e as one autograd node: frozen banks with trained vectors, as VeRA has them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .node import Context, again, as_output, cast, column_sums, matrix
from .terms import Banks


def banked_linear(x: Tensor, W: Tensor, b: Tensor | None, term: Banks) -> Tensor:
    """x Wᵀ + b + s·((x Aᵀ ⊙ d) Bᵀ) ⊙ e for frozen A, B, W: gradients of the vectors alone."""
    A, B, d, e, s = term
    return _Banked.apply(x, W, b, cast(A, x), cast(B, x), d.to(x.dtype), s * e.to(x.dtype))


class _Banked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, d: Tensor, e: Tensor
    ) -> Tensor:
        y = F.linear(x, W, b)
        h = matrix(x) @ A.T  # [T, r]
        u = (h * d) @ B.T  # [T, n]
        y.view(u.shape).addcmul_(u, e)
        ctx.save_for_backward(x, W, A, B, d, e, h, u)
        return as_output(y)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, W, A, B, d, e, h, u = ctx.saved_tensors
        needs, dy2 = ctx.needs_input_grad, matrix(dy)
        if torch.is_grad_enabled():

            def formula(x: Tensor, d: Tensor, e: Tensor) -> Tensor:
                return F.linear(x, W) + F.linear(F.linear(x, A) * d, B) * e

            return again(formula, (x, d, e), needs, dy)
        de = column_sums(dy2 * u) if needs[6] else None
        dx = dd = None
        if needs[0] or needs[5]:
            g = (dy2 * e) @ B
            dd = column_sums(g * h) if needs[5] else None
            dx = (dy2 @ W).addmm_(g.mul_(d), A).view(*dy.shape[:-1], A.shape[1]) if needs[0] else None
        return dx, None, None, None, None, dd, de
