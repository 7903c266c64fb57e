"""The Triton kernels of the low-rank products: what runs on a tile. `triton_lowrank` says what they are for.

They use the language's primitives only, none of its library functions: these are bound to one mode when Triton is
imported, while interpreted and compiled kernels may live side by side (`triton_launch`).

Parameters in capitals are compile-time constants. `r`: rank. `w`: a weight, or with GROUPED an array of addresses of
weights of element type W_TYPE. RANK_ROWS: the weight is [rank, columns] like A, else [columns, rank] like B; w_row is
the distance of its rows (with GROUPED they are contiguous). A launch's first axis runs over tiles of rows: `chunk`
rows each, or with GROUPED what `tiles` lists, (adapter, first row, end row).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

tl: Any = None  # triton.language in the scope that `triton_launch` gives the kernels

Function: TypeAlias = Callable[..., object]


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
