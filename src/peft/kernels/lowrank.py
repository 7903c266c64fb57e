"""y = x Wᵀ + b + Σᵢ sᵢ·dropᵢ(x) Aᵢᵀ Bᵢᵀ as one autograd node, for a frozen W.

Against the same formula in separate operations this saves the temporaries: each product is accumulated into y, dx with
`addmm_`. For backward it keeps x once (the caller's tensor, so layers that share their input share the copy), the thin
h = x Aᵀ, and for dropout a bit an entry or a seed; nothing outside `save_for_backward`. Factors are cast down to x's
dtype, never x up to theirs: master weights stay in fp32 and get fp32 gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dropout, triton_launch, triton_lowrank
from .node import Context, Where, again, as_output, cast, matrix
from .terms import Thin

MANY = 16  # rows from which on the Triton kernels are worth their launches

Spec: TypeAlias = tuple[tuple[float, float, Where], ...]  # each term's scale, dropout and rows


class Held(Context, Protocol):
    spec: Spec
    seeds: list[int]


def lowrank_linear(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    terms: list[Thin],
    drop: Sequence[float] | None = None,
    where: Sequence[Where] | None = None,
) -> Tensor:
    """x[..., k], W[n, k], b[n] or None -> y[..., n].

    drop: one dropout probability a term. where: which of x's flattened rows each term is about.
    """
    n = len(terms)
    if not torch.is_grad_enabled() or not (
        x.requires_grad or any(t.A.requires_grad or t.B.requires_grad for t in terms)
    ):
        y = F.linear(x, W, b)
        if drop is None and where is None and x.numel() == W.size(1):
            _add_token(x.view(-1), y.view(-1), terms)
            return y
        x2, y2 = matrix(x), y.view(-1, y.shape[-1])  # a view or an error: y2 is added into
        for t, p, at in zip(terms, drop or [0.0] * n, where or [None] * n, strict=True):
            add_term(x2, y2, cast(t.A, x), cast(t.B, x), t.scale, p, at)
        return y
    drop, where = drop or [0.0] * n, where or [None] * n
    spec = tuple((t.scale, p, at) for t, p, at in zip(terms, drop, where, strict=True))
    if x.shape[:-1].numel() >= MANY and all(at is None for at in where) and triton_launch.available(x):
        return _OnDevice.apply(x, W, b, spec, *(f for t in terms for f in (t.A, t.B)))
    return _LowRank.apply(x, W, b, spec, *(f for t in terms for f in (t.A, t.B)))


def _add_token(x: Tensor, y: Tensor, terms: list[Thin]) -> None:
    """y[n] += Σ s·B A x for one x[k]: vectors cost less than matrices of one row, and casting x less than the factors."""
    for A, B, s, _ in terms:
        if A.dtype is x.dtype:
            y.addmv_(cast(B, x), torch.mv(A, x), alpha=s)
        elif A.dtype is torch.float32:
            y.copy_(y.float().addmv_(B.float(), torch.mv(A, x.float()), alpha=s))
        else:
            y.addmv_(cast(B, x), torch.mv(cast(A, x), x), alpha=s)


def add_term(
    x2: Tensor, y2: Tensor, A: Tensor, B: Tensor, s: float, p: float, where: Where
) -> tuple[Tensor, Tensor | None, int]:
    """y2 += s·drop(x2) Aᵀ Bᵀ on the rows `where`; returns h, the packed mask, and its seed."""
    xs, bits, seed, k = dropout.drop(x2 if where is None else x2[where], p)
    s = s * k
    if xs.shape[0] == 1 and isinstance(where, slice):
        h = torch.mv(A, xs[0])
        y2[where.start].addmv_(B, h, alpha=s)
        return h[None], bits, seed
    h = xs @ A.T  # [T, r]
    if isinstance(where, Tensor):
        y2.index_add_(0, where, h @ B.T, alpha=s)
    else:
        (y2 if where is None else y2[where]).addmm_(h, B.T, alpha=s)
    return h, bits, seed


def _plain_sum(spec: Spec, masks: Sequence[Tensor | None], seeds: Sequence[int], W: Tensor) -> Callable[..., Tensor]:
    """The formula of `lowrank_linear`, but for the bias."""

    def formula(x: Tensor, *flat: Tensor) -> Tensor:
        y = F.linear(x, W)
        y2, x2 = matrix(y), matrix(x)
        for i, (s, p, where) in enumerate(spec):
            xs = x2 if where is None else x2[where]
            keep, k = dropout.kept(xs, p, masks[i], seeds[i])
            xs = xs if keep is None else dropout.dropped(xs, keep)
            part = s * k * F.linear(F.linear(xs, cast(flat[2 * i], x)), cast(flat[2 * i + 1], x))
            at = torch.arange(len(y2), device=x.device)[slice(None) if where is None else where]
            y2 = y2.index_add(0, at, part)
        return y2.view(y.shape)

    return formula


def again_on_device(
    spec: Spec, W: Tensor, inputs: Sequence[Tensor], needs: Sequence[bool], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """`again` for nodes whose masks exist only inside kernels."""
    if any(p for _, p, _ in spec):
        raise NotImplementedError(
            "Second derivatives with dropout on a GPU: set the dropout to 0, or compute them in eval mode."
        )
    return again(_plain_sum(spec, [None] * len(spec), [0] * len(spec), W), inputs, needs, dy)


class _OnDevice(torch.autograd.Function):
    """The same node by Triton kernels: fewer passes over y, dy and dx, and dropout drawn where it is used."""

    @staticmethod
    def forward(ctx: Held, x: Tensor, W: Tensor, b: Tensor | None, spec: Spec, *flat: Tensor) -> Tensor:
        y = F.linear(x, W, b)
        x2, y2 = matrix(x), y.view(-1, y.shape[-1])  # a view or an error: y2 is added into
        hidden, seeds = [], []
        for i, (s, p, _) in enumerate(spec):
            seeds.append(int(torch.randint(2**62, (1,)).item()) if p else 0)
            hidden.append(triton_lowrank.shrink(x2, flat[2 * i], p, seeds[-1]))
            triton_lowrank.expand_(y2, hidden[-1], flat[2 * i + 1], s)
        ctx.save_for_backward(x, W, *flat, *hidden)
        ctx.spec, ctx.seeds = spec, seeds
        return as_output(y)

    @staticmethod
    def backward(ctx: Held, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        m = len(ctx.spec)
        x, W, *rest = ctx.saved_tensors
        flat, hidden = rest[: 2 * m], rest[2 * m :]
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return again_on_device(ctx.spec, W, (x, *flat), needs, dy)
        dy2, x2 = matrix(dy), matrix(x)
        dx = dy2 @ W if needs[0] else None
        out: list[Tensor | None] = []
        for i, (s, p, _) in enumerate(ctx.spec):
            A, B = flat[2 * i], flat[2 * i + 1]
            dh, dB = triton_lowrank.grad_h_B(dy2, hidden[i], B, s, B.dtype)
            dA = None
            if dx is not None and needs[4 + 2 * i]:
                dA = triton_lowrank.grad_A_x_(dx, dh, x2, A, p, ctx.seeds[i], A.dtype)
            elif dx is not None:
                triton_lowrank.grad_x_(dx, dh, A, p, ctx.seeds[i])
            elif needs[4 + 2 * i]:
                dA = triton_lowrank.grad_A(dh, x2, p, ctx.seeds[i], A.dtype)
            out += [dA, dB if needs[5 + 2 * i] else None]
        return None if dx is None else dx.view(x.shape), None, None, None, *out


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Held, x: Tensor, W: Tensor, b: Tensor | None, spec: Spec, *flat: Tensor) -> Tensor:
        y = F.linear(x, W, b)
        x2, y2 = matrix(x), y.view(-1, y.shape[-1])  # a view or an error: y2 is added into
        hidden, masks, seeds = [], [], []
        for i, (s, p, where) in enumerate(spec):
            A, B = cast(flat[2 * i], x), cast(flat[2 * i + 1], x)
            h, bits, seed = add_term(x2, y2, A, B, s, p, where)
            hidden.append(h)
            masks.append(bits)
            seeds.append(seed)
        ctx.save_for_backward(x, W, *flat, *hidden, *masks)
        ctx.spec, ctx.seeds = spec, seeds
        return as_output(y)

    @staticmethod
    def backward(ctx: Held, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        m = len(ctx.spec)
        x, W, *rest = ctx.saved_tensors
        flat, hidden, masks = rest[: 2 * m], rest[2 * m : 3 * m], rest[3 * m :]
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return again(_plain_sum(ctx.spec, masks, ctx.seeds, W), (x, *flat), needs, dy)
        dy2, x2 = matrix(dy), matrix(x)
        dx = dy2 @ W if needs[0] else None
        out: list[Tensor | None] = []
        for i, (s, p, where) in enumerate(ctx.spec):
            A, B = cast(flat[2 * i], x), cast(flat[2 * i + 1], x)
            xs, dys = (x2, dy2) if where is None else (x2[where], dy2[where])
            keep, k = dropout.kept(xs, p, masks[i], ctx.seeds[i])
            s = s * k
            dh = (dys @ B).mul_(s) if needs[0] or needs[4 + 2 * i] else None  # [T, r]
            dA = dB = None
            if needs[4 + 2 * i]:
                assert dh is not None
                dA = dh.T @ (xs if keep is None else dropout.dropped(xs, keep))
            if needs[5 + 2 * i]:
                dB = (dys.T @ hidden[i]).mul_(s)
            if dx is not None and dh is not None:
                if keep is not None:
                    added = dropout.dropped(dh @ A, keep)
                    dx = _into(dx, where, added)
                elif isinstance(where, Tensor):
                    dx.index_add_(0, where, dh @ A)
                else:
                    (dx if where is None else dx[where]).addmm_(dh, A)
            out += [dA, dB]
        return None if dx is None else dx.view(x.shape), None, None, None, *out


def _into(total: Tensor, where: Where, part: Tensor) -> Tensor:
    if isinstance(where, Tensor):
        return total.index_add_(0, where, part)
    (total if where is None else total[where]).add_(part)
    return total
