"""An adapter per row of the batch: by the grouped kernels on a GPU; elsewhere, and where all have equally many rows, in
order, their factors stacked, as batched products.

    y[i] += s·x[i] Aᵢᵀ Bᵢᵀ        x[N, T, k], A[N, r, k], B[N, n, r]

Against one product after another this saves most of the launches. The stacks pass through memory that all layers of a
call share, so that copying into it stays in the cache; backward stacks anew and keeps nothing but what `_LowRank` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from . import triton_launch
from .lowrank import MANY
from .node import Context, Where, again, as_output
from .terms import Thin
from .triton_rows import grouped_linear, runs_of

Found = TypeVar("Found")


class Scratch:
    """What the layers of a call share: memory for one stack at a time, which `clear` gives back between calls, and how
    the rows fall into segments."""

    def __init__(self) -> None:
        self.held: Tensor | None = None
        self.found: dict[tuple[object, ...], tuple[Sequence[Where], Any]] = {}

    def of(self, find: Callable[[Sequence[Where], torch.device], Found], where: Sequence[Where], x: Tensor) -> Found:
        """What `find` says of these rows, known by the objects that say where. They are kept, so that no other can take
        their place."""
        key = (find, x.device, *map(id, where))
        if key not in self.found:
            self.found[key] = where, find(where, x.device)
        return self.found[key][1]

    def stack(self, factors: Sequence[Tensor], like: Tensor) -> Tensor:
        """The factors as one tensor of `like`'s dtype; valid until the next stack."""
        shape = torch.Size((len(factors), *factors[0].shape))
        need, held = shape.numel(), self.held
        if held is None or held.numel() < need or held.dtype is not like.dtype or held.device != like.device:
            self.held = held = torch.empty(need, dtype=like.dtype, device=like.device)
        out = held[:need].view(shape)
        if factors[0].dtype is like.dtype:
            return torch.stack(tuple(factors), out=out)
        torch._foreach_copy_(list(out.unbind()), list(factors))
        return out

    def clear(self) -> None:
        self.held = None


def rows_linear(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    terms: list[Thin],
    where: Sequence[Where],
    drop: Sequence[float] | None,
    scratch: Scratch,
) -> Tensor | None:
    """x[..., k] -> y[..., n] with the terms' own rows. None where neither the grouped kernels nor batched products take
    it: these want an even, ascending share of the rows each, and no dropout."""
    many = x.shape[:-1].numel() >= MANY
    if terms and many and triton_launch.available(x) and len(set(drop or [0.0])) == 1:
        runs = scratch.of(runs_of, where, x)
        if runs is not None and (y := grouped_linear(x, W, b, terms, runs, drop[0] if drop else 0.0)) is not None:
            return y
    share = None if drop else scratch.of(share_of, where, x)
    if share is None or not _alike(terms) or x.device.type == "meta":
        return None
    flat = [f for t in terms for f in (t.A, t.B)]
    if not torch.is_grad_enabled():
        return _forward(x, W, b, terms[0].scale, share, scratch, *flat)[0]
    return _Rows.apply(x, W, b, terms[0].scale, share, scratch, *flat)


def share_of(where: Sequence[Where], device: torch.device) -> tuple[int, int, int] | None:
    """(first row, adapters, rows of each) where all have equally many, one adapter's after the other's."""
    if len(where) < 2 or not isinstance(first := where[0], slice):
        return None
    at, rows = first.start, first.stop - first.start
    for place in where:
        if not isinstance(place, slice) or place.start != at or place.stop != at + rows:
            return None
        at += rows
    return first.start, len(where), rows


def _alike(terms: list[Thin]) -> bool:
    """Whether the factors can be stacked."""
    shapes, dtypes = {t.A.shape for t in terms}, {f.dtype for t in terms for f in (t.A, t.B)}
    return len(shapes) == len(dtypes) == len({t.scale for t in terms}) == 1


def _part(t: Tensor, share: tuple[int, int, int]) -> Tensor:
    """[..., channels] -> [adapters, rows of each, channels], to be read or, of a contiguous t, written."""
    first, n, rows = share
    return t.view(-1, t.shape[-1])[first : first + n * rows].view(n, rows, -1)


def _forward(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    s: float,
    share: tuple[int, int, int],
    scratch: Scratch,
    *flat: Tensor,
) -> tuple[Tensor, Tensor]:
    y = F.linear(x, W, b)
    h = torch.bmm(_part(x.contiguous(), share), scratch.stack(flat[::2], x).mT)  # [N, T, r]
    _part(y, share).baddbmm_(h, scratch.stack(flat[1::2], x).mT, alpha=s)
    return y, h


class Held(Context, Protocol):
    s: float
    share: tuple[int, int, int]
    scratch: Scratch


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Held,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        s: float,
        share: tuple[int, int, int],
        scratch: Scratch,
        *flat: Tensor,
    ) -> Tensor:
        y, h = _forward(x, W, b, s, share, scratch, *flat)
        ctx.s, ctx.share, ctx.scratch = s, share, scratch
        ctx.save_for_backward(x, W, h, *flat)
        return as_output(y)

    @staticmethod
    def backward(ctx: Held, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0].contiguous()
        x, W, h, *flat = ctx.saved_tensors
        share, scratch, s, needs = ctx.share, ctx.scratch, ctx.s, ctx.needs_input_grad
        if torch.is_grad_enabled():
            first, n, rows = share

            def formula(x: Tensor, *flat: Tensor) -> Tensor:
                A, B = (torch.stack(f).to(x.dtype) for f in (flat[::2], flat[1::2]))
                part = s * torch.bmm(torch.bmm(_part(x.contiguous(), share), A.mT), B.mT)
                y = F.linear(x, W)
                at = torch.arange(first, first + n * rows, device=x.device)
                return y.view(-1, len(W)).index_add(0, at, part.flatten(0, 1)).view(y.shape)

            return again(formula, (x, *flat), needs, dy)
        dys, xs = _part(dy, share), _part(x.contiguous(), share)
        dx = torch.matmul(dy, W) if needs[0] else None
        dB = torch.bmm(dys.mT, h * s) if any(needs[7::2]) else None
        dA = None
        if dx is not None or any(needs[6::2]):
            dh = torch.bmm(dys, scratch.stack(flat[1::2], x)).mul_(s)  # [N, T, r]
            dA = torch.bmm(dh.mT, xs) if any(needs[6::2]) else None
            if dx is not None:
                _part(dx, share).baddbmm_(dh, scratch.stack(flat[::2], x))
        scratch.clear()
        out: list[Tensor | None] = []
        for i in range(share[1]):
            for d, needed in ((dA, needs[6 + 2 * i]), (dB, needs[7 + 2 * i])):
                out.append(d[i] if d is not None and needed else None)
        return dx, None, None, None, None, None, *out
