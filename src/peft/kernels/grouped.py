"""y_s = W_e x_s + b_e + Σᵢ s_ie·B_ie A_ie dropᵢ(x_s) for rows sorted by their matrix e, as one autograd node for a stack.

The same sums as `lowrank_linear`'s, for each group of rows, without what a call of a layer costs: at 128 experts of small
widths that is nearly all. What backward keeps is x, the thin h[S, r] of each term, and for dropout a bit an entry or a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dropout
from .node import Context, again, as_output
from .terms import Thin


class Stack(NamedTuple):
    """Frozen matrices: W[E, n, k], strided anyhow, and b[E, n]."""

    W: Tensor
    b: Tensor | None


class Spec(NamedTuple):
    """How many rows each matrix has; each term's scale for each of them; and each term's dropout."""

    counts: tuple[int, ...]
    scales: tuple[tuple[float, ...], ...]
    drop: tuple[float, ...]


class Held(Context, Protocol):
    spec: Spec
    seeds: list[int]


def grouped_linear(
    x: Tensor, stack: Stack, counts: Sequence[int], terms: Sequence[Sequence[Thin]], drop: Sequence[float]
) -> Tensor:
    """x[S, k], of which the first `counts[0]` rows meet W[0], the next `counts[1]` W[1], … -> y[S, n].

    terms: for each adapter the thin products, one for each matrix and all of a rank. drop: a probability for each adapter.
    Factors of matrices without rows get gradients of zero, not None: distributed training waits for all of them.
    """
    spec = Spec(tuple(counts), tuple(tuple(t.scale for t in term) for term in terms), tuple(drop))
    flat = [f for term in terms for f in (*(t.A for t in term), *(t.B for t in term))]
    return _Grouped.apply(x, *stack, spec, *flat)


def _cast(factors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    if all(f.dtype is dtype for f in factors):
        return factors
    return torch.stack(tuple(factors)).to(dtype).unbind()  # two operations for all


def _each(flat: Sequence[Tensor], n: int, dtype: torch.dtype) -> list[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """(A of each matrix, B of each matrix) for each term."""
    return [(_cast(flat[i : i + n], dtype), _cast(flat[i + n : i + 2 * n], dtype)) for i in range(0, len(flat), 2 * n)]


def _used(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """The matrices that have rows, and which."""
    found, start = [], 0
    for e, n in enumerate(counts):
        if n:
            found.append((e, slice(start, start + n)))
        start += n
    return found


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Held, x: Tensor, W: Tensor, b: Tensor | None, spec: Spec, *flat: Tensor) -> Tensor:
        used = _used(spec.counts)
        y = x.new_empty(len(x), W.shape[1])
        Ws, bs = W.mT.unbind(), None if b is None else b.unbind()
        ys = [y[at] for _, at in used]
        for (e, at), part in zip(used, ys, strict=True):
            if bs is None:
                torch.mm(x[at], Ws[e], out=part)
            else:
                torch.addmm(bs[e], x[at], Ws[e], out=part)
        held: list[tuple[Tensor, Tensor | None, int]] = []
        for (As, Bs), scales, p in zip(_each(flat, len(W), x.dtype), spec.scales, spec.drop, strict=True):
            xs, bits, seed, k = dropout.drop(x, p)
            h = x.new_empty(len(x), len(As[0]))
            for (e, at), part in zip(used, ys, strict=True):
                thin = h[at]
                torch.mm(xs[at], As[e].T, out=thin)
                part.addmm_(thin, Bs[e].T, alpha=scales[e] * k)
            held.append((h, bits, seed))
        ctx.save_for_backward(x, W, *flat, *(h for h, _, _ in held), *(bits for _, bits, _ in held))
        ctx.spec, ctx.seeds = spec, [seed for _, _, seed in held]
        return as_output(y)

    @staticmethod
    def backward(ctx: Held, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), spec, needs = grads, ctx.spec, ctx.needs_input_grad
        x, W, *rest = ctx.saved_tensors
        n, m = len(W), len(spec.drop)
        flat, hidden, masks = rest[: 2 * n * m], rest[2 * n * m :][:m], rest[2 * n * m + m :]
        if torch.is_grad_enabled():
            return again(_plain_sum(spec, masks, ctx.seeds, W), (x, *flat), needs, dy)
        used, dy = _used(spec.counts), dy.contiguous()
        dys = [dy[at] for _, at in used]
        dx = torch.empty_like(x) if needs[0] else None
        if dx is not None:
            Ws = W.unbind()
            for (e, at), dye in zip(used, dys, strict=True):
                torch.mm(dye, Ws[e], out=dx[at])
        out: list[Tensor | None] = []
        for i, (As, Bs) in enumerate(_each(flat, n, x.dtype)):
            first = 4 + 2 * n * i
            need_A, need_B = needs[first : first + n], needs[first + n : first + 2 * n]
            keep, k = dropout.kept(x, spec.drop[i], masks[i], ctx.seeds[i])
            xs = x if keep is None or not any(need_A) else dropout.dropped(x, keep)
            into = dx if keep is None or dx is None else torch.zeros_like(dx)
            dA: list[Tensor | None] = [None] * n
            dB: list[Tensor | None] = [None] * n
            for (e, at), dye in zip(used, dys, strict=True):
                s = spec.scales[i][e] * k
                if into is not None or need_A[e]:
                    dh = (dye @ Bs[e]).mul_(s)
                    if need_A[e]:
                        dA[e] = dh.T @ xs[at]
                    if into is not None:
                        into[at].addmm_(dh, As[e])
                if need_B[e]:
                    dB[e] = (dye.T @ hidden[i][at]).mul_(s)
            if keep is not None and dx is not None and into is not None:
                dx += dropout.dropped(into, keep)
            for found, need, factors in ((dA, need_A, As), (dB, need_B, Bs)):
                out += [
                    torch.zeros_like(f) if g is None and wanted else g
                    for g, wanted, f in zip(found, need, factors, strict=True)
                ]
        return dx, None, None, None, *out


def _plain_sum(spec: Spec, masks: Sequence[Tensor | None], seeds: Sequence[int], W: Tensor) -> Callable[..., Tensor]:
    """The formula, but for the bias, in plain operations."""

    def formula(x: Tensor, *flat: Tensor) -> Tensor:
        dropped = []
        for p, bits, seed in zip(spec.drop, masks, seeds, strict=True):
            keep, k = dropout.kept(x, p, bits, seed)
            dropped.append((x if keep is None else dropout.dropped(x, keep), k))
        parts, each = [], _each(flat, len(W), x.dtype)
        for e, at in _used(spec.counts):
            y = F.linear(x[at], W[e])
            for (As, Bs), scales, (xs, k) in zip(each, spec.scales, dropped, strict=True):
                y = y + scales[e] * k * F.linear(F.linear(xs[at], As[e]), Bs[e])
            parts.append(y)
        idle = sum((f.sum() * 0 for f in flat), x.new_zeros(()))
        return torch.cat(parts) + idle if parts else x.new_zeros(0, W.shape[1]) + idle

    return formula


class Deal(NamedTuple):
    """How tokens go to experts: `order`, the pairs (token, k-th choice) sorted by expert, and its inverse; k choices each."""

    order: Tensor
    inverse: Tensor
    k: int

    @classmethod
    def of(cls, order: Tensor, k: int) -> Deal:
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return cls(order, inverse, k)

    def out(self, x: Tensor) -> Tensor:
        """x[T, h] -> [T·k, h], each token's row for each of its choices, in the order of the experts."""
        return _Out.apply(x, self)

    def back(self, y: Tensor) -> Tensor:
        """y[T·k, n] -> [T, n], each token's sum over its choices: the adjoint of `out`."""
        return _Back.apply(y, self)


class Dealt(Context, Protocol):
    deal: Deal


class _Out(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Dealt, x: Tensor, deal: Deal) -> Tensor:
        ctx.deal = deal
        return x.index_select(0, deal.order // deal.k)

    @staticmethod
    def backward(ctx: Dealt, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Back.apply(grads[0], ctx.deal), None


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Dealt, y: Tensor, deal: Deal) -> Tensor:
        ctx.deal = deal
        return y.index_select(0, deal.inverse).view(len(y) // deal.k, deal.k, y.shape[-1]).sum(1)

    @staticmethod
    def backward(ctx: Dealt, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Out.apply(grads[0], ctx.deal), None
