"""An adapter per row of the batch by the grouped Triton kernels: a launch for all adapters, whatever their ranks, their
strengths and the order of the rows.

Rows of one adapter that follow each other are a segment; an adapter with several has its address in the table several
times, and its gradient is their sum. Nothing is stacked or sorted.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import triton_lowrank
from .lowrank import MANY, Thin, Where, _matrix, _plain_sum, again
from .triton_lowrank import Segments


class Runs(NamedTuple):
    """segments: rows that follow each other; terms: which term each segment has, -1 for none."""

    segments: Segments
    terms: tuple[int, ...]


def runs_of(where: Sequence[Where], device: torch.device) -> Runs | None:
    """None where rows have more than one term."""
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
            terms.append(-1)
        offsets.append(last)
        terms.append(i)
    return Runs(Segments(offsets, device), tuple(terms))


def grouped_linear(
    x: Tensor, W: Tensor, b: Tensor | None, terms: Sequence[Thin], runs: Runs, p: float = 0.0
) -> Tensor | None:
    """x[..., k] -> y[..., n] with the terms on their segments' rows. p: dropout on all of them. None where the kernels
    take something of it as it is not."""
    flat = [f for t in terms for f in (t.A, t.B)]
    if not triton_lowrank.available(x) or x.shape[:-1].numel() < MANY:
        return None
    one = flat[0]
    if one.dtype not in triton_lowrank.DTYPES or any(
        f.dtype is not one.dtype or f.device != x.device or not f.is_contiguous() or f.data_ptr() % 16 for f in flat
    ):
        return None
    return _Grouped.apply(x, W, b, runs, tuple(float(t.scale) for t in terms), p, *flat)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=4096)
def _table(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Known by its values: made once for all steps in which no tensor moves."""
    return torch.tensor(values, dtype=dtype, device=device)


class _Tables(NamedTuple):
    A: Tensor
    B: Tensor
    ranks: Tensor
    scales: Tensor
    widest: int


def _tables(runs: Runs, scales: tuple[float, ...], flat: Sequence[Tensor]) -> _Tables:
    device = flat[0].device
    A, B = ([f.data_ptr() for f in flat[start::2]] + [0] for start in (0, 1))  # -1 finds what stands for no term
    ranks, strengths = [len(f) for f in flat[::2]] + [0], [*scales, 0.0]

    def table(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return _table(tuple(values[i] for i in runs.terms), dtype, device)

    return _Tables(
        table(A, torch.int64),
        table(B, torch.int64),
        table(ranks, torch.int32),
        table(strengths, torch.float32),
        max(ranks),
    )


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        runs: Runs,
        scales: tuple[float, ...],
        p: float,
        *flat: Tensor,
    ) -> Tensor:
        y = F.linear(x, W, b)
        seed = int(torch.randint(2**62, (1,)).item()) if p else 0
        t, weights = _tables(runs, scales, flat), flat[0].dtype
        h = triton_lowrank.grouped_shrink(_matrix(x), t.A, t.ranks, runs.segments, t.widest, p, seed, weights)
        triton_lowrank.grouped_expand_(y.view(-1, len(W)), h, t.B, t.ranks, t.scales, runs.segments, weights)
        ctx.save_for_backward(x, W, h, *flat)
        ctx.runs, ctx.scales, ctx.p, ctx.seed = runs, scales, p, seed
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, W, h, *flat = ctx.saved_tensors
        runs, needs = ctx.runs, ctx.needs_input_grad
        if torch.is_grad_enabled():
            if ctx.p:
                raise NotImplementedError(
                    "Second derivatives with dropout on a GPU: set the dropout to 0, or compute them in eval mode."
                )
            formula = _plain_sum(_spec(runs, ctx.scales, x.device), [None] * len(flat), [0] * len(flat), W)
            dx, *found = again(formula, (x, *flat), (needs[0], *needs[6:]), dy)
            return dx, None, None, None, None, None, *found
        dy2, x2 = _matrix(dy), _matrix(x)
        dx = dy2 @ W if needs[0] else None
        t, kept = _tables(runs, ctx.scales, flat), flat[0].dtype
        dA, dB = triton_lowrank.grouped_grads(
            dy2, x2, h, t.A, t.B, t.ranks, t.scales, runs.segments, dx, ctx.p, ctx.seed, kept, kept
        )
        out: list[Tensor | None] = []
        for i, A in enumerate(flat[::2]):
            mine, r = [s for s, term in enumerate(runs.terms) if term == i], len(A)
            out.append(_sum([dA[s, :r] for s in mine], A) if needs[6 + 2 * i] else None)
            out.append(_sum([dB[s, :, :r] for s in mine], flat[2 * i + 1]) if needs[7 + 2 * i] else None)
        return None if dx is None else dx.view(x.shape), None, None, None, None, None, *out


def _sum(parts: list[Tensor], like: Tensor) -> Tensor:
    if not parts:
        return torch.zeros_like(like)
    return parts[0].contiguous() if len(parts) == 1 else torch.stack(parts).sum(0)


def _spec(runs: Runs, scales: tuple[float, ...], device: torch.device) -> tuple[tuple[float, float, Where], ...]:
    """The terms with their rows, as `lowrank_linear` has them."""
    offsets = runs.segments.offsets
    rows: list[list[Tensor]] = [[] for _ in scales]
    for first, last, term in zip(offsets, offsets[1:], runs.terms, strict=False):
        if term >= 0:
            rows[term].append(torch.arange(first, last, device=device))
    return tuple((s, 0.0, torch.cat(at)) for s, at in zip(scales, rows, strict=True))
