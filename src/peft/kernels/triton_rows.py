"""An adapter per row of the batch by the grouped Triton kernels: as many launches as one adapter takes, whatever their
number, ranks and strengths and the order of the rows.

Rows of one adapter that follow each other are a segment; an adapter's gradient is the sum over its segments. Factors are
found by their addresses, nothing is stacked or sorted.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from . import triton_launch, triton_lowrank
from .lowrank import Spec, again_on_device
from .node import Context, Where, as_output, matrix
from .terms import Thin
from .triton_lowrank import Segments


def runs_of(where: Sequence[Where], device: torch.device) -> Segments | None:
    """Rows that follow each other and have the same term, or none, whose number is then that of the terms. None where
    rows have more than one term."""
    spans: list[tuple[int, int, int]] = []
    for i, at in enumerate(where):
        if at is None:
            return None
        if isinstance(at, slice):
            spans.append((at.start, at.stop, i))
            continue
        if not len(at):
            continue
        index = at.cpu()
        cuts = (index.diff() != 1).nonzero().flatten() + 1
        spans += [(int(part[0]), int(part[-1]) + 1, i) for part in index.tensor_split(cuts)]
    offsets, terms = [0], []
    for first, last, i in sorted(spans):
        if first < offsets[-1]:
            return None
        if first > offsets[-1]:
            offsets.append(first)
            terms.append(len(where))
        offsets.append(last)
        terms.append(i)
    return Segments(offsets, device, terms)


def grouped_linear(
    x: Tensor, W: Tensor, b: Tensor | None, terms: Sequence[Thin], runs: Segments, p: float = 0.0
) -> Tensor | None:
    """x[..., k] -> y[..., n] with the terms on their segments' rows. p: dropout on all of them. None where the kernels
    take something of it as it is not."""
    flat = [f for t in terms for f in (t.A, t.B)]
    one = flat[0]
    if one.dtype not in triton_launch.DTYPES or any(
        f.dtype is not one.dtype or f.device != x.device or not f.is_contiguous() or f.data_ptr() % 16 for f in flat
    ):
        return None
    return _Grouped.apply(x, W, b, runs, tuple(float(t.scale) for t in terms), p, *flat)


@functools.lru_cache(maxsize=4096)
def _table(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Known by its values: made once for all calls, as long as no factor moves."""
    return torch.tensor(values, dtype=dtype, device=device)


class _Tables(NamedTuple):
    A: Tensor
    B: Tensor
    ranks: Tensor
    scales: Tensor
    widest: int


def _tables(scales: tuple[float, ...], flat: Sequence[Tensor]) -> _Tables:
    """By term; the last entry, of rank 0, stands for none."""
    device, ranks = flat[0].device, [f.shape[0] for f in flat[::2]]
    return _Tables(
        _table((*(f.data_ptr() for f in flat[::2]), 0), torch.int64, device),
        _table((*(f.data_ptr() for f in flat[1::2]), 0), torch.int64, device),
        _table((*ranks, 0), torch.int32, device),
        _table((*scales, 0.0), torch.float32, device),
        max(ranks),
    )


class Held(Context, Protocol):
    runs: Segments
    scales: tuple[float, ...]
    p: float
    seed: int


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Held,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        runs: Segments,
        scales: tuple[float, ...],
        p: float,
        *flat: Tensor,
    ) -> Tensor:
        y = F.linear(x, W, b)
        seed = int(torch.randint(2**62, (1,)).item()) if p else 0
        t, weights = _tables(scales, flat), flat[0].dtype
        h = triton_lowrank.grouped_shrink(matrix(x), t.A, t.ranks, runs, t.widest, p, seed, weights)
        triton_lowrank.grouped_expand_(y.view(-1, len(W)), h, t.B, t.ranks, t.scales, runs, weights)
        ctx.save_for_backward(x, W, h, *flat)
        ctx.runs, ctx.scales, ctx.p, ctx.seed = runs, scales, p, seed
        return as_output(y)

    @staticmethod
    def backward(ctx: Held, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, W, h, *flat = ctx.saved_tensors
        runs, needs = ctx.runs, ctx.needs_input_grad
        if torch.is_grad_enabled():
            spec = _spec(runs, ctx.scales, ctx.p, x.device)
            return again_on_device(spec, W, (x, *flat), needs, dy)
        dy2, x2 = matrix(dy), matrix(x)
        dx = dy2 @ W if needs[0] else None
        t, kept = _tables(ctx.scales, flat), flat[0].dtype
        dA, dB = triton_lowrank.grouped_grads(
            dy2, x2, h, t.A, t.B, t.ranks, t.scales, runs, dx, ctx.p, ctx.seed, kept, kept
        )
        out: list[Tensor | None] = []
        for i, A in enumerate(flat[::2]):
            mine, r = [s for s, term in enumerate(runs.terms) if term == i], A.shape[0]
            out.append(_sum([dA[s, :r] for s in mine], A) if needs[6 + 2 * i] else None)
            out.append(_sum([dB[s, :, :r] for s in mine], flat[2 * i + 1]) if needs[7 + 2 * i] else None)
        return None if dx is None else dx.view(x.shape), None, None, None, None, None, *out


def _sum(parts: list[Tensor], like: Tensor) -> Tensor:
    if not parts:
        return torch.zeros_like(like)
    return parts[0].contiguous() if len(parts) == 1 else torch.stack(parts).sum(0)


def _spec(runs: Segments, scales: tuple[float, ...], p: float, device: torch.device) -> Spec:
    """The terms with their rows, as `lowrank_linear` has them."""
    rows = [[torch.arange(0, device=device)] for _ in (*scales, 0.0)]
    for first, last, term in zip(runs.offsets, runs.offsets[1:], runs.terms, strict=False):
        rows[term].append(torch.arange(first, last, device=device))
    return tuple((s, p, torch.cat(at)) for s, at in zip(scales, rows, strict=False))
