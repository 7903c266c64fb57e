"""The low-rank products as Triton kernels: dropout drawn in the kernel, accumulation into y and dx, N adapters at once.

One adapter, x[T, k], y[T, n], A[r, k], B[n, r], the mask M = keep/(1 − p) of (p, seed):

    shrink      h  = (M ⊙ x) Aᵀ                   neither M nor the dropped x is stored
    expand_     y += s h Bᵀ                       one read and write of y
    grad_h_B    dh = s dy B,   dB = s dyᵀ h       up to rank 32 from one read of dy
    grad_A      dA = dhᵀ (M ⊙ x)
    grad_x_     dx += M ⊙ (dh A)
    grad_A_x_   the last two with M drawn once

N adapters in one batch (`grouped_*`): the rows are sorted by adapter, rows offsets[i]..offsets[i + 1] belong to adapter
i, whose weights are found through an array of addresses, so that ranks may differ and nothing is stacked. h has R
columns, the largest rank; columns beyond an adapter's own rank are zero. Rank 0 stands for rows of the base model.

Products accumulate in fp32. Weights may be wider than x: they are rounded to x's dtype as they are loaded, as a cast
in front of a product does. Sums over many tiles go through a buffer of partial sums that a second kernel adds up in a
fixed order: no atomics, so the same call on the same device gives the same bits, and block sizes are a function of the
shapes, not of a timing.

The mask is Philox4x32-10 with the seed as key and (column // 8, row) as counter. One draw gives 128 bits: eight columns
of 16 bits, so p is rounded to 1/65536, and the cost of drawing stays below that of reading x. It depends on seed, row
and column alone, so every kernel sees the same mask whatever its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .triton_launch import blocks, cdiv, drop_arguments, launch, padded_rank, precision, processors, triton_type


# -- rows of several adapters --------------------------------------------------------------------------------------------------------
class Segments:
    """How the rows of a batch fall to N adapters: made once a batch, used in every layer.

    `offsets`: N + 1 ascending row numbers, on the host. From a tensor on the GPU they have to be fetched, which waits
    for it. Rows before the first and after the last offset belong to nobody and are left alone. `terms`: which entry of
    the tables of addresses, ranks and scales a segment has, where that is not its own number.
    """

    def __init__(
        self, offsets: Tensor | Sequence[int], device: torch.device, terms: Sequence[int] | None = None
    ) -> None:
        self.offsets: list[int] = offsets.tolist() if isinstance(offsets, Tensor) else list(offsets)
        self.device = device
        self.terms = list(range(len(self.offsets) - 1)) if terms is None else list(terms)
        self._tiles: dict[int, tuple[Tensor, Tensor]] = {}
        self._order: Tensor | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def tiles(self, rows: int) -> tuple[Tensor, Tensor]:
        """Tiles of at most `rows` rows that lie in one segment, int32 [tiles, 3], and each segment's first, [N + 1]."""
        if rows not in self._tiles:
            table: list[tuple[int, int, int]] = []
            first = [0]
            for a, lo, hi in zip(self.terms, self.offsets, self.offsets[1:]):
                table += [(a, row, min(row + rows, hi)) for row in range(lo, hi, rows)]
                first.append(len(table))
            made = torch.tensor(table, dtype=torch.int32).view(-1, 3), torch.tensor(first, dtype=torch.int32)
            self._tiles[rows] = made[0].to(self.device), made[1].to(self.device)
        return self._tiles[rows]

    def by_segment(self, table: Tensor) -> Tensor:
        """A table's entries in the order of the segments."""
        if self._order is None:
            self._order = torch.tensor(self.terms).to(self.device)
        return table[self._order]

    def covers(self, T: int) -> bool:
        return self.offsets[0] <= 0 and self.offsets[-1] >= T


def pointers(weights: Sequence[Tensor | None]) -> Tensor:
    """The addresses of contiguous weights of one dtype, int64 [N] on their device. The caller keeps them alive.

    None stands for rank 0. The kernels read 16 bytes at a time, hence the alignment, which torch's allocations have.
    """
    held = [w for w in weights if w is not None and w.numel()]
    if len({(w.dtype, w.device) for w in held}) > 1:
        raise ValueError("Weights of one array of addresses must share dtype and device.")
    for w in held:
        if not w.is_contiguous() or w.data_ptr() % 16:
            raise ValueError("Weights given by address must be contiguous and start at a multiple of 16 bytes.")
    device = held[0].device if held else torch.device("cpu")
    return torch.tensor([w.data_ptr() if w is not None and w.numel() else 0 for w in weights]).to(device)


class _Group(NamedTuple):
    """What a launch needs to know of the adapters: nothing but rank and scale for one, tables for N."""

    ranks: Tensor | None
    scales: Tensor | None
    segments: Segments | None

    def tiles(self, T: int, rows: int) -> tuple[int, Tensor | None, Tensor | None]:
        if self.segments is None:
            return cdiv(T, rows), None, None
        table, first = self.segments.tiles(rows)
        return len(table), table, first

    def scales_of_segments(self) -> Tensor | None:
        return None if self.scales is None or self.segments is None else self.segments.by_segment(self.scales)

    def fresh(self, shape: tuple[int, ...], T: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A result by rows: zero where no tile writes."""
        whole = self.segments is None or self.segments.covers(T)
        return (torch.empty if whole else torch.zeros)(shape, dtype=dtype, device=device)


ONE = _Group(None, None, None)


def _parts(tiles: int, columns: int, block: int, device: torch.device) -> tuple[int, int]:
    """(parts, columns in each): split a sum over columns until the device is busy, but not below eight blocks."""
    wanted = max(1, min(2 * processors(device) // max(tiles, 1), columns // (8 * block)))
    span = cdiv(cdiv(columns, wanted), block) * block
    return cdiv(columns, span), span


def _total_of(
    part: Tensor, out: Tensor, scale: float = 1.0, first: Tensor | None = None, scales: Tensor | None = None
) -> Tensor:
    """Add up partial sums part[count, ...] into out[...], or with `first` into out[N, ...]."""
    many = first is not None
    M = out[0].numel() if many else out.numel()
    grid = (cdiv(M, 512), out.shape[0] if many else 1)
    launch("_total", grid, part, part, out, first, scales, M, part.shape[0], scale, GROUPED=many, BLOCK=512)
    return out


def _by_rows(t: Tensor) -> Tensor:
    """Entries of a row side by side, as the kernels read them: not in transposed or expanded tensors."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _in_place(t: Tensor) -> None:
    if _by_rows(t) is not t:
        raise ValueError("A tensor that is added to must have the entries of a row side by side.")


def _run_shrink(
    x: Tensor, w: Tensor, r: int, R: int, rank_rows: bool, p: float, seed: int, s: float, group: _Group,
    w_type: torch.dtype,
) -> Tensor:  # fmt: skip
    T, k = x.shape
    if not (T and k and R):
        return x.new_zeros(T, R)
    x, w = _by_rows(x), _by_rows(w)
    width = padded_rank(R)
    b = blocks("_shrink", width, x.element_size())
    tiles, table, _ = group.tiles(T, b.rows)
    parts, span = _parts(tiles, k, b.columns, x.device)
    drop, random, undo = drop_arguments(p, seed)
    h = group.fresh((T, R), T, x.dtype, x.device)
    out = h if parts == 1 else group.fresh((parts, T, R), T, torch.float32, x.device)
    if tiles:
        launch(
            "_shrink", (tiles, parts), x, x, w, out, table, group.ranks, group.scales, T, k, r, R, x.stride(0),
            w.stride(0), span, s * undo, *random, RANK_ROWS=rank_rows, GROUPED=group.segments is not None, DROP=drop,
            W_TYPE=triton_type(w_type), PRECISION=precision(x), BLOCK_T=b.rows, BLOCK_C=b.columns, BLOCK_R=width,
            num_warps=b.warps, num_stages=b.stages,
        )  # fmt: skip
    return h if parts == 1 else _total_of(out, h)


def _run_expand(
    y: Tensor, h: Tensor, w: Tensor, r: int, rank_rows: bool, p: float, seed: int, s: float, group: _Group,
    w_type: torch.dtype,
) -> None:  # fmt: skip
    T, n = y.shape
    width = padded_rank(h.shape[1])
    b = blocks("_expand", width, y.element_size())
    tiles, table, _ = group.tiles(T, b.rows)
    if not (tiles and n and h.shape[1]):
        return
    _in_place(y)
    h, w = _by_rows(h), _by_rows(w)
    drop, random, undo = drop_arguments(p, seed)
    launch(
        "_expand", (tiles, cdiv(n, b.columns)), y, y, h, w, table, group.ranks, group.scales, T, n, r, y.stride(0),
        h.stride(0), w.stride(0), s * undo, *random, RANK_ROWS=rank_rows, GROUPED=group.segments is not None, DROP=drop,
        W_TYPE=triton_type(w_type), PRECISION=precision(y), BLOCK_T=b.rows, BLOCK_C=b.columns, BLOCK_R=width,
        STEP=min(width, 64),        num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip


def _run_both(
    dy: Tensor, h: Tensor, B: Tensor, r: int, s: float, group: _Group, w_type: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dh[T, R] and dB[n, R] (dB[N, n, R] for N adapters)."""
    T, n = dy.shape
    R = h.shape[1]
    many = group.segments is not None
    width = padded_rank(R)
    dy, h, B = _by_rows(dy), _by_rows(h), _by_rows(B)
    if width > 32 or not (
        T and n and R
    ):  # dB's partial sums, 2R/rows of dy's bytes, would cost more than a second read
        dh = _run_shrink(dy, B, r, R, False, 0.0, 0, s, group, w_type)
        return dh, _run_grad(dy, h, None, None, r, False, 0.0, 0, s, group, w_type, dtype)
    b = blocks("_both", width, dy.element_size())
    tiles, table, first = group.tiles(T, b.rows)
    parts, span = _parts(tiles, n, b.columns, dy.device)
    dh = group.fresh((T, R), T, dy.dtype, dy.device)
    dh_part = dh if parts == 1 else group.fresh((parts, T, R), T, torch.float32, dy.device)
    dB_part = torch.empty(tiles, n, R, dtype=torch.float32, device=dy.device)
    if tiles:
        launch(
            "_both", (tiles, parts), dy, dy, h, B, dh_part, dB_part, table, group.ranks, group.scales, T, n, r, R,
            dy.stride(0), h.stride(0), B.stride(0), span, s, GROUPED=many, W_TYPE=triton_type(w_type),
            PRECISION=precision(dy), BLOCK_T=b.rows, BLOCK_C=b.columns, BLOCK_R=width, num_warps=b.warps,
            num_stages=b.stages,
        )  # fmt: skip
    if parts > 1:
        _total_of(dh_part, dh)
    dB = torch.empty((len(group.segments), n, R) if group.segments else (n, R), dtype=dtype, device=dy.device)
    return dh, _total_of(dB_part, dB, s, first, group.scales_of_segments())


def _run_grad(
    x: Tensor, h: Tensor, dx: Tensor | None, w: Tensor | None, r: int, rank_rows: bool, p: float, seed: int, s: float,
    group: _Group, w_type: torch.dtype, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """hᵀ (M ⊙ x) as [R, k], or [k, R] without `rank_rows`; an axis of N adapters first. With dx: dx += M ⊙ (h w)."""
    T, k = x.shape
    R = h.shape[1]
    many = group.segments is not None
    shape: tuple[int, ...] = (R, k) if rank_rows else (k, R)
    shape = (len(group.segments), *shape) if group.segments is not None else shape
    if not (T and k and R):
        return torch.zeros(shape, dtype=dtype, device=x.device)
    x, h, w = _by_rows(x), _by_rows(h), w if w is None else _by_rows(w)
    if dx is not None:
        _in_place(dx)
    width = padded_rank(R)
    b = blocks("_grad", width, x.element_size())
    across = cdiv(k, b.columns)
    wanted = max(1, min(2 * processors(x.device) // across, cdiv(T, 4 * b.rows)))
    chunk = cdiv(cdiv(T, wanted), b.rows) * b.rows
    tiles, table, first = group.tiles(T, chunk)
    drop, random, undo = drop_arguments(p, seed)
    direct = tiles == 1 and not many
    out = torch.empty(shape, dtype=dtype, device=x.device)
    part = out if direct else torch.empty(tiles, k * R, dtype=torch.float32, device=x.device)
    if tiles:
        launch(
            "_grad", (tiles, across), x, x, h, part, dx, w, table, group.ranks, T, k, r, R, chunk, x.stride(0),
            h.stride(0), 0 if dx is None else dx.stride(0), 0 if w is None else w.stride(0),
            s * undo, *random, RANK_ROWS=rank_rows, GROUPED=many, DROP=drop,
            W_TYPE=triton_type(w_type), PRECISION=precision(x), ADD=dx is not None, BLOCK_T=b.rows, BLOCK_C=b.columns,
            BLOCK_R=width, num_warps=b.warps, num_stages=b.stages,
        )  # fmt: skip
    return out if direct else _total_of(part, out, 1.0, first, group.scales_of_segments())


# -- one adapter -------------------------------------------------------------------------------------------------------
def shrink(x: Tensor, A: Tensor, p: float, seed: int) -> Tensor:
    """h[T, r] = (M ⊙ x) Aᵀ."""
    return _run_shrink(x, A, A.shape[0], A.shape[0], True, p, seed, 1.0, ONE, A.dtype)


def expand_(y: Tensor, h: Tensor, B: Tensor, s: float) -> None:
    """y[T, n] += s h Bᵀ in place."""
    _run_expand(y, h, B, B.shape[1], False, 0.0, 0, float(s), ONE, B.dtype)


def grad_h_B(dy: Tensor, h: Tensor, B: Tensor, s: float, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """dh[T, r] = s dy B and dB[n, r] = s dyᵀ h. `dtype`: dB's, for a master in fp32; dy's by default."""
    return _run_both(dy, h, B, B.shape[1], float(s), ONE, B.dtype, dtype or dy.dtype)


def grad_A(dh: Tensor, x: Tensor, p: float, seed: int, dtype: torch.dtype | None = None) -> Tensor:
    """dA[r, k] = dhᵀ (M ⊙ x), in `dtype` or x's."""
    return _run_grad(x, dh, None, None, dh.shape[1], True, p, seed, 1.0, ONE, x.dtype, dtype or x.dtype)


def grad_x_(dx: Tensor, dh: Tensor, A: Tensor, p: float, seed: int) -> None:
    """dx[T, k] += M ⊙ (dh A) in place."""
    _run_expand(dx, dh, A, A.shape[0], True, p, seed, 1.0, ONE, A.dtype)


def grad_A_x_(
    dx: Tensor, dh: Tensor, x: Tensor, A: Tensor, p: float, seed: int, dtype: torch.dtype | None = None
) -> Tensor:
    """`grad_A` and `grad_x_` in one pass: the mask is drawn and dh is read once."""
    return _run_grad(x, dh, dx, A, A.shape[0], True, p, seed, 1.0, ONE, A.dtype, dtype or x.dtype)


def mask(
    shape: Sequence[int], p: float, seed: int, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """M[..., k] = keep/(1 − p) as the kernels draw it; leading axes count as rows."""
    out = torch.ones(*shape, dtype=dtype, device=device)
    drop, random, undo = drop_arguments(p, seed)
    if drop and out.numel():
        k = shape[-1]
        T = out.numel() // k
        launch("_mask", (cdiv(T, 64), cdiv(k, 64)), out, out, T, k, *random, undo, BLOCK_T=64, BLOCK_C=64)
    return out


# -- N adapters --------------------------------------------------------------------------------------------------------
def _group(ranks: Tensor, scales: Tensor | None, offsets: Tensor | Sequence[int] | Segments, like: Tensor) -> _Group:
    segments = offsets if isinstance(offsets, Segments) else Segments(offsets, like.device)
    return _Group(ranks, scales, segments)


def grouped_shrink(
    x: Tensor, A_ptrs: Tensor, ranks: Tensor, offsets: Tensor | Sequence[int] | Segments, R: int,
    p: float = 0.0, seed: int = 0, weights: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """h[T, R] = (M ⊙ x) Aᵢᵀ with the Aᵢ[rᵢ, k] of each row. `ranks`: int32 [N] on x's device; `weights`: the Aᵢ's
    dtype, x's by default."""
    return _run_shrink(x, A_ptrs, R, R, True, p, seed, 1.0, _group(ranks, None, offsets, x), weights or x.dtype)


def grouped_expand_(
    y: Tensor, h: Tensor, B_ptrs: Tensor, ranks: Tensor, scales: Tensor, offsets: Tensor | Sequence[int] | Segments,
    weights: torch.dtype | None = None,
) -> None:  # fmt: skip
    """y[T, n] += sᵢ h Bᵢᵀ in place, with the Bᵢ[n, rᵢ] and sᵢ (`scales`: fp32 [N]) of each row."""
    _run_expand(y, h, B_ptrs, h.shape[1], False, 0.0, 0, 1.0, _group(ranks, scales, offsets, y), weights or y.dtype)


def grouped_grads(
    dy: Tensor, x: Tensor, h: Tensor, A_ptrs: Tensor, B_ptrs: Tensor, ranks: Tensor, scales: Tensor,
    offsets: Tensor | Sequence[int] | Segments, dx: Tensor | None = None, p: float = 0.0, seed: int = 0,
    dtype: torch.dtype | None = None, weights: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dA[N, R, k] and dB[N, n, R], zero beyond an adapter's rank, in `dtype` or x's; dx += M ⊙ (dh Aᵢ) in place where
    given."""
    group = _group(ranks, scales, offsets, dy)
    w_type, dtype = weights or x.dtype, dtype or x.dtype
    dh, dB = _run_both(dy, h, B_ptrs, h.shape[1], 1.0, group, w_type, dtype)
    unscaled = group._replace(scales=None)  # dh carries them
    dA = _run_grad(x, dh, dx, A_ptrs, h.shape[1], True, p, seed, 1.0, unscaled, w_type, dtype)
    return dA, dB
