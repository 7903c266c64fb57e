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

Triton is imported at first use. Under TRITON_INTERPRET=1 tensors on the CPU run through Triton's interpreter. The
kernels use the language's primitives only, none of its library functions: these are bound to one mode when Triton is
imported, while interpreted and compiled kernels may live side by side here.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import types
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

tl: Any = None  # triton.language in the kernels' own scope, see `_kernels`

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Function: TypeAlias = Callable[..., object]


# -- kernels -----------------------------------------------------------------------------------------------------------
# Parameters in capitals are compile-time constants. `r`: rank. `w`: a weight, or with GROUPED an array of addresses of
# weights of element type W_TYPE. RANK_ROWS: the weight is [rank, columns] like A, else [columns, rank] like B; w_row is
# the distance of its rows (with GROUPED they are contiguous). A launch's first axis runs over tiles of rows: `chunk`
# rows each, or with GROUPED what `tiles` lists, (adapter, first row, end row).


def _tile(tiles, ranks, scales, T, r, scale, chunk, GROUPED: tl.constexpr):
    pid = tl.program_id(0)
    if GROUPED:
        a = tl.load(tiles + 3 * pid)
        s = scale
        if scales is not None:
            s = scale * tl.load(scales + a)
        return a, tl.load(tiles + 3 * pid + 1), tl.load(tiles + 3 * pid + 2), tl.load(ranks + a), s
    else:
        return 0, pid * chunk, tl.minimum(pid * chunk + chunk, T), r, scale


def _weight(w, a, j, c, r, columns, w_row, RANK_ROWS: tl.constexpr, GROUPED: tl.constexpr, W_TYPE: tl.constexpr):
    """The weight's entries at ranks j and columns c, which broadcast against each other; zero outside."""
    if GROUPED:
        base = tl.multiple_of(tl.load(w + a).to(tl.pointer_type(W_TYPE)), 16)
    else:
        base = w
    if RANK_ROWS:
        at = j * (columns if GROUPED else w_row) + c
    else:
        at = c * (r if GROUPED else w_row) + j
    return tl.load(base + at, mask=(j < r) & (c < columns), other=0.0)


def _keep(seed_lo, seed_hi, rows, col, threshold, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which entries of rows × (col..col + BLOCK_C) stay, [BLOCK_T, BLOCK_C] booleans; 8 divides col."""
    k0 = seed_lo.to(tl.uint32, bitcast=True)
    k1 = seed_hi.to(tl.uint32, bitcast=True)
    group = (col // 8 + tl.arange(0, BLOCK_C // 8)).to(tl.uint32)
    c0 = group[None, :] + tl.full([BLOCK_T, BLOCK_C // 8], 0, tl.uint32)
    c1 = rows.to(tl.uint32)[:, None] + tl.full([BLOCK_T, BLOCK_C // 8], 0, tl.uint32)
    c2 = tl.full([BLOCK_T, BLOCK_C // 8], 0, tl.uint32)
    c3 = tl.full([BLOCK_T, BLOCK_C // 8], 0, tl.uint32)
    m0 = tl.full([BLOCK_T, BLOCK_C // 8], 0xD2511F53, tl.uint32)
    m1 = tl.full([BLOCK_T, BLOCK_C // 8], 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(m0, c0)
        high1 = tl.umulhi(m1, c2)
        low0 = tl.mul(m0, c0, sanitize_overflow=False)
        low1 = tl.mul(m1, c2, sanitize_overflow=False)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    # the draws of a group lie side by side in a thread, as the eight columns of a 16-byte load do
    words = tl.reshape(tl.join(tl.join(c0, c1), tl.join(c2, c3)), [BLOCK_T, BLOCK_C // 2])
    bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BLOCK_T, BLOCK_C])
    return bits.to(tl.int32) >= threshold


def _mask(out, T, k, seed_lo, seed_hi, threshold, scale, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    col = tl.program_id(1) * BLOCK_C
    c = col + tl.arange(0, BLOCK_C)
    keep = _keep(seed_lo, seed_hi, rows, col, threshold, BLOCK_T, BLOCK_C)
    at = rows.to(tl.int64)[:, None] * k + c[None, :]
    value = tl.where(keep, scale, 0.0).to(out.dtype.element_ty)
    tl.store(out + at, value, mask=(rows[:, None] < T) & (c[None, :] < k))


def _shrink(
    x, w, h, tiles, ranks, scales, T, k, r, R, x_row, w_row, span, scale, seed_lo, seed_hi, threshold,
    RANK_ROWS: tl.constexpr, GROUPED: tl.constexpr, DROP: tl.constexpr, W_TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h[part, T, R] = scale (M ⊙ x) wᵀ over the `span` columns of each part (the launch's second axis)."""
    a, row0, row1, rank, s = _tile(tiles, ranks, scales, T, r, scale, BLOCK_T, GROUPED)
    rows = row0 + tl.arange(0, BLOCK_T)
    inside = (rows < row1)[:, None]
    at = rows.to(tl.int64)[:, None]
    j = tl.arange(0, BLOCK_R)[None, :]
    part = tl.program_id(1)
    acc = tl.full([BLOCK_T, BLOCK_R], 0.0, tl.float32)
    for col in range(part * span, tl.minimum(part * span + span, k), BLOCK_C):
        c = col + tl.arange(0, BLOCK_C)
        xt = tl.load(x + at * x_row + c[None, :], mask=inside & (c[None, :] < k), other=0.0)
        wt = _weight(w, a, j, c[:, None], rank, k, w_row, RANK_ROWS, GROUPED, W_TYPE)
        if DROP:
            xt = tl.where(_keep(seed_lo, seed_hi, rows, col, threshold, BLOCK_T, BLOCK_C), xt, 0.0).to(xt.dtype)
        acc = tl.dot(xt, wt.to(xt.dtype), acc, input_precision=PRECISION)
    out = h + part.to(tl.int64) * T * R + at * R + j
    tl.store(out, (acc * s).to(h.dtype.element_ty), mask=inside & (j < R))


def _expand(
    y, h, w, tiles, ranks, scales, T, n, r, y_row, h_row, w_row, scale, seed_lo, seed_hi, threshold,
    RANK_ROWS: tl.constexpr, GROUPED: tl.constexpr, DROP: tl.constexpr, W_TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """y += scale M ⊙ (h w) for w[rank, columns] (RANK_ROWS), y += scale h wᵀ for w[columns, rank]."""
    a, row0, row1, rank, s = _tile(tiles, ranks, scales, T, r, scale, BLOCK_T, GROUPED)
    rows = row0 + tl.arange(0, BLOCK_T)
    inside = (rows < row1)[:, None]
    at = rows.to(tl.int64)[:, None]
    col = tl.program_id(1) * BLOCK_C
    c = (col + tl.arange(0, BLOCK_C))[None, :]
    yp = y + at * y_row + c
    here = inside & (c < n)
    yt = tl.load(yp, mask=here, other=0.0)
    acc = tl.full([BLOCK_T, BLOCK_C], 0.0, tl.float32)
    for start in range(0, BLOCK_R, STEP):  # in slices: a whole product of rank 256 does not fit into registers in fp32
        j = start + tl.arange(0, STEP)
        ht = tl.load(h + at * h_row + j[None, :], mask=inside & (j[None, :] < rank), other=0.0)
        wt = _weight(w, a, j[:, None], c, rank, n, w_row, RANK_ROWS, GROUPED, W_TYPE)
        acc = tl.dot(ht.to(yt.dtype), wt.to(yt.dtype), acc, input_precision=PRECISION)
    change = acc * s
    if DROP:
        change = tl.where(_keep(seed_lo, seed_hi, rows, col, threshold, BLOCK_T, BLOCK_C), change, 0.0)
    tl.store(yp, (yt.to(tl.float32) + change).to(yt.dtype), mask=here)


def _both(
    dy, h, w, dh, dw, tiles, ranks, scales, T, n, r, R, dy_row, h_row, w_row, span, scale,
    GROUPED: tl.constexpr, W_TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dh[part, T, R] = scale dy w over the part's columns, and dw[tile, n, R] = dyᵀ h over the tile's rows."""
    a, row0, row1, rank, s = _tile(tiles, ranks, scales, T, r, scale, BLOCK_T, GROUPED)
    rows = row0 + tl.arange(0, BLOCK_T)
    inside = (rows < row1)[:, None]
    at = rows.to(tl.int64)[:, None]
    j = tl.arange(0, BLOCK_R)[None, :]
    part = tl.program_id(1)
    ht = tl.load(h + at * h_row + j, mask=inside & (j < rank), other=0.0).to(dy.dtype.element_ty)
    dw_tile = dw + tl.program_id(0).to(tl.int64) * n * R
    acc = tl.full([BLOCK_T, BLOCK_R], 0.0, tl.float32)
    for col in range(part * span, tl.minimum(part * span + span, n), BLOCK_C):
        c = col + tl.arange(0, BLOCK_C)
        g = tl.load(dy + at * dy_row + c[None, :], mask=inside & (c[None, :] < n), other=0.0)
        wt = _weight(w, a, j, c[:, None], rank, n, w_row, False, GROUPED, W_TYPE)
        acc = tl.dot(g, wt.to(g.dtype), acc, input_precision=PRECISION)
        dwt = tl.dot(tl.trans(g), ht, input_precision=PRECISION)
        tl.store(dw_tile + c[:, None] * R + j, dwt, mask=(c[:, None] < n) & (j < R))
    out = dh + part.to(tl.int64) * T * R + at * R + j
    tl.store(out, (acc * s).to(dh.dtype.element_ty), mask=inside & (j < R))


def _grad(
    x, h, dw, dx, w, tiles, ranks, T, k, r, R, chunk, x_row, h_row, dx_row, w_row, scale, seed_lo, seed_hi, threshold,
    RANK_ROWS: tl.constexpr, GROUPED: tl.constexpr, DROP: tl.constexpr, W_TYPE: tl.constexpr, PRECISION: tl.constexpr,
    ADD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dw[tile, R, k] = scale hᵀ (M ⊙ x) over the tile's rows (or its transpose, [tile, k, R], without RANK_ROWS);
    with ADD also dx += scale M ⊙ (h w)."""
    a, row0, row1, rank, s = _tile(tiles, ranks, None, T, r, scale, chunk, GROUPED)
    col = tl.program_id(1) * BLOCK_C
    c = (col + tl.arange(0, BLOCK_C))[None, :]
    j = tl.arange(0, BLOCK_R)
    if ADD:
        wt = _weight(w, a, j[:, None], c, rank, k, w_row, True, GROUPED, W_TYPE).to(x.dtype.element_ty)
    acc = tl.full([BLOCK_R, BLOCK_C], 0.0, tl.float32)
    for row in range(row0, row1, BLOCK_T):
        rows = row + tl.arange(0, BLOCK_T)
        inside = (rows < row1)[:, None]
        at = rows.to(tl.int64)[:, None]
        here = inside & (c < k)
        xt = tl.load(x + at * x_row + c, mask=here, other=0.0)
        ht = tl.load(h + at * h_row + j[None, :], mask=inside & (j[None, :] < rank), other=0.0).to(xt.dtype)
        if DROP:
            keep = _keep(seed_lo, seed_hi, rows, col, threshold, BLOCK_T, BLOCK_C)
            xt = tl.where(keep, xt, 0.0).to(xt.dtype)
        acc = tl.dot(tl.trans(ht), xt, acc, input_precision=PRECISION)
        if ADD:
            change = tl.dot(ht, wt, input_precision=PRECISION) * s
            if DROP:
                change = tl.where(keep, change, 0.0)
            old = tl.load(dx + at * dx_row + c, mask=here, other=0.0)
            tl.store(dx + at * dx_row + c, (old.to(tl.float32) + change).to(old.dtype), mask=here)
    out = dw + tl.program_id(0).to(tl.int64) * k * R
    if RANK_ROWS:
        out = out + j[:, None] * k + c
    else:
        out = out + c * R + j[:, None]
    tl.store(out, (acc * s).to(dw.dtype.element_ty), mask=(j[:, None] < R) & (c < k))


def _total(part, out, first, scales, M, count, scale, GROUPED: tl.constexpr, BLOCK: tl.constexpr):
    """out[a, M] = scale scales[a] Σ part[i, M] over i in first[a]..first[a + 1], in this order; else over all parts."""
    a = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < M
    if GROUPED:
        lo = tl.load(first + a)
        hi = tl.load(first + a + 1)
    else:
        lo = a * 0
        hi = count
    s = scale
    if scales is not None:
        s = scale * tl.load(scales + a)
    acc = tl.full([BLOCK], 0.0, tl.float32)
    for i in range(lo, hi, 4):
        for u in tl.static_range(4):  # four loads in flight
            row = tl.full([BLOCK], 0, tl.int64) + (i + u)
            acc += tl.load(part + row * M + at, mask=inside & (row < hi), other=0.0)
    tl.store(out + a.to(tl.int64) * M + at, (acc * s).to(out.dtype.element_ty), mask=inside)


HELPERS: tuple[Function, ...] = (_tile, _weight, _keep)
KERNELS: tuple[Function, ...] = (_mask, _shrink, _expand, _both, _grad, _total)
# values that change from call to call, which must not give a new kernel each
FREE = ("seed_lo", "seed_hi", "threshold", "count")


# -- building and launching --------------------------------------------------------------------------------------------
@functools.cache
def _kernels(interpret: bool) -> dict[str, Any]:
    """The kernels of one mode, in a scope of their own where helpers and `tl` are that mode's."""
    import triton.language

    if interpret:
        from triton.runtime.interpreter import InterpretedFunction
    else:
        from triton.runtime.jit import JITFunction

    scope: dict[str, Any] = {"__name__": __name__, "__file__": __file__, "tl": triton.language}

    def bound(fn: Function) -> types.FunctionType:
        copy = types.FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__)
        copy.__annotations__, copy.__module__, copy.__qualname__ = fn.__annotations__, __name__, fn.__qualname__
        return copy

    for fn in HELPERS:
        scope[fn.__name__] = bound(fn) if interpret else JITFunction(bound(fn))
    for fn in KERNELS:
        free = [name for name in FREE if name in fn.__code__.co_varnames[: fn.__code__.co_argcount]]
        made = bound(fn)
        scope[fn.__name__] = InterpretedFunction(made) if interpret else JITFunction(made, do_not_specialize=free)
    return scope


@functools.cache
def _installed() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        import triton.language  # noqa: F401
    except Exception:  # a build for another platform: as good as none
        return False
    return True


@functools.cache
def _capable(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (8, 0)


@functools.cache
def _processors(device: torch.device) -> int:
    """How many programs run side by side. The interpreter's number makes small tests split their sums, too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def available(x: Tensor) -> bool:
    """Whether the kernels take x: on a GPU with Triton installed, or interpreted under TRITON_INTERPRET=1.

    The interpreter multiplies bfloat16 wrongly: numpy does not know the type.
    """
    if x.dtype not in DTYPES:
        return False
    if x.is_cuda:
        return _installed() and _capable(x.device.index or 0)
    interpreted = x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return interpreted and x.dtype != torch.bfloat16 and _installed()


def _launch(name: str, grid: tuple[int, ...], like: Tensor, *args: object, **constants: object) -> None:
    kernel = _kernels(not like.is_cuda)[name]
    elsewhere = like.is_cuda and like.device.index != torch.cuda.current_device()
    with torch.cuda.device(like.device) if elsewhere else nullcontext():
        kernel[grid](*args, **constants)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _width(r: int) -> int:
    """Ranks as the matrix units take them: a power of two, 16 or more."""
    return max(16, 1 << (r - 1).bit_length())


def _precision(like: Tensor) -> str:
    """How fp32 is multiplied. Three TF32 products keep fp32's accuracy and use the matrix units."""
    if not like.is_cuda or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _type(dtype: torch.dtype) -> object:
    import triton.language as language

    return {torch.float16: language.float16, torch.bfloat16: language.bfloat16, torch.float32: language.float32}[dtype]


class Blocks(NamedTuple):
    """A launch's tile of rows and columns, and the kernel's warps and pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int


def blocks(kernel: str, width: int, itemsize: int) -> Blocks:
    """By padded rank and bytes an element: tiles that leave registers and shared memory for several programs at once.

    Chosen by compiling for sm_80 and sm_90 and looking at registers, spills and shared memory.
    """
    wide = itemsize > 2
    warps = 4 if width < 128 else 8
    if kernel == "_both":
        return Blocks(64, 32, 4, 2) if wide else Blocks(128, 64, 4, 3)
    if kernel == "_expand":
        return Blocks(64, 32 if wide else 64, 4, 2)
    rows = 32 if wide and width > 64 and kernel == "_grad" else 64
    columns = (32 if wide else 64) if width < 256 else (16 if wide else 32)
    return Blocks(rows, columns, warps, 3 if kernel == "_shrink" and not wide else 2)


def _drop(p: float, seed: int) -> tuple[bool, tuple[int, int, int], float]:
    """(whether to drop, (seed's low and high half, threshold), 1/(1 − p)) with p as the 16 bits can say it."""
    if p <= 0:
        return False, (0, 0, 0), 1.0
    threshold = min(round(p * 65536), 65536)
    halves = [((seed >> shift) & 0xFFFFFFFF) for shift in (0, 32)]
    lo, hi = (v - (1 << 32) if v >> 31 else v for v in halves)  # always int32, which keeps the kernel's type
    return True, (lo, hi, threshold), 0.0 if threshold == 65536 else 65536 / (65536 - threshold)


# -- N adapters --------------------------------------------------------------------------------------------------------
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
            return _cdiv(T, rows), None, None
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
    wanted = max(1, min(2 * _processors(device) // max(tiles, 1), columns // (8 * block)))
    span = _cdiv(_cdiv(columns, wanted), block) * block
    return _cdiv(columns, span), span


def _total_of(
    part: Tensor, out: Tensor, scale: float = 1.0, first: Tensor | None = None, scales: Tensor | None = None
) -> Tensor:
    """Add up partial sums part[count, ...] into out[...], or with `first` into out[N, ...]."""
    many = first is not None
    M = out[0].numel() if many else out.numel()
    grid = (_cdiv(M, 512), out.shape[0] if many else 1)
    _launch("_total", grid, part, part, out, first, scales, M, part.shape[0], scale, GROUPED=many, BLOCK=512)
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
    width = _width(R)
    b = blocks("_shrink", width, x.element_size())
    tiles, table, _ = group.tiles(T, b.rows)
    parts, span = _parts(tiles, k, b.columns, x.device)
    drop, random, undo = _drop(p, seed)
    h = group.fresh((T, R), T, x.dtype, x.device)
    out = h if parts == 1 else group.fresh((parts, T, R), T, torch.float32, x.device)
    if tiles:
        _launch(
            "_shrink", (tiles, parts), x, x, w, out, table, group.ranks, group.scales, T, k, r, R, x.stride(0),
            w.stride(0), span, s * undo, *random, RANK_ROWS=rank_rows, GROUPED=group.segments is not None, DROP=drop,
            W_TYPE=_type(w_type), PRECISION=_precision(x), BLOCK_T=b.rows, BLOCK_C=b.columns, BLOCK_R=width,
            num_warps=b.warps, num_stages=b.stages,
        )  # fmt: skip
    return h if parts == 1 else _total_of(out, h)


def _run_expand(
    y: Tensor, h: Tensor, w: Tensor, r: int, rank_rows: bool, p: float, seed: int, s: float, group: _Group,
    w_type: torch.dtype,
) -> None:  # fmt: skip
    T, n = y.shape
    width = _width(h.shape[1])
    b = blocks("_expand", width, y.element_size())
    tiles, table, _ = group.tiles(T, b.rows)
    if not (tiles and n and h.shape[1]):
        return
    _in_place(y)
    h, w = _by_rows(h), _by_rows(w)
    drop, random, undo = _drop(p, seed)
    _launch(
        "_expand", (tiles, _cdiv(n, b.columns)), y, y, h, w, table, group.ranks, group.scales, T, n, r, y.stride(0),
        h.stride(0), w.stride(0), s * undo, *random, RANK_ROWS=rank_rows, GROUPED=group.segments is not None, DROP=drop,
        W_TYPE=_type(w_type), PRECISION=_precision(y), BLOCK_T=b.rows, BLOCK_C=b.columns, BLOCK_R=width,
        STEP=min(width, 64),        num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip


def _run_both(
    dy: Tensor, h: Tensor, B: Tensor, r: int, s: float, group: _Group, w_type: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dh[T, R] and dB[n, R] (dB[N, n, R] for N adapters)."""
    T, n = dy.shape
    R = h.shape[1]
    many = group.segments is not None
    width = _width(R)
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
        _launch(
            "_both", (tiles, parts), dy, dy, h, B, dh_part, dB_part, table, group.ranks, group.scales, T, n, r, R,
            dy.stride(0), h.stride(0), B.stride(0), span, s, GROUPED=many, W_TYPE=_type(w_type),
            PRECISION=_precision(dy), BLOCK_T=b.rows, BLOCK_C=b.columns, BLOCK_R=width, num_warps=b.warps,
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
    width = _width(R)
    b = blocks("_grad", width, x.element_size())
    across = _cdiv(k, b.columns)
    wanted = max(1, min(2 * _processors(x.device) // across, _cdiv(T, 4 * b.rows)))
    chunk = _cdiv(_cdiv(T, wanted), b.rows) * b.rows
    tiles, table, first = group.tiles(T, chunk)
    drop, random, undo = _drop(p, seed)
    direct = tiles == 1 and not many
    out = torch.empty(shape, dtype=dtype, device=x.device)
    part = out if direct else torch.empty(tiles, k * R, dtype=torch.float32, device=x.device)
    if tiles:
        _launch(
            "_grad", (tiles, across), x, x, h, part, dx, w, table, group.ranks, T, k, r, R, chunk, x.stride(0),
            h.stride(0), 0 if dx is None else dx.stride(0), 0 if w is None else w.stride(0),
            s * undo, *random, RANK_ROWS=rank_rows, GROUPED=many, DROP=drop,
            W_TYPE=_type(w_type), PRECISION=_precision(x), ADD=dx is not None, BLOCK_T=b.rows, BLOCK_C=b.columns,
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
    drop, random, undo = _drop(p, seed)
    if drop and out.numel():
        k = shape[-1]
        T = out.numel() // k
        _launch("_mask", (_cdiv(T, 64), _cdiv(k, 64)), out, out, T, k, *random, undo, BLOCK_T=64, BLOCK_C=64)
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
