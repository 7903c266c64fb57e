"""y = x Wᵀ + b + Σᵢ sᵢ·dropᵢ(x) Aᵢᵀ Bᵢᵀ as one autograd node, for a frozen W; and with rows scaled, as DoRA needs it.

Against the same formula in separate operations this saves the temporaries: each product is accumulated into y, dx with
`addmm_`. For backward it keeps x once (the caller's tensor, so layers that share their input share the copy), the thin
h = x Aᵀ, and for dropout a bit an entry or a seed; nothing outside `save_for_backward`. Factors are cast down to x's
dtype, never x up to theirs: master weights stay in fp32 and get fp32 gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dropout, triton_lowrank
from .terms import Banks, Thin

MANY = 16  # rows from which on the Triton kernels are worth their launches


Where = slice | Tensor | None  # which rows of x a term is about; None: all


def usable(x: Tensor) -> bool:
    """Whether the fused node may run: eager mode, no function transforms, no autocast (which would mix dtypes)."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return not (torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type))


def lowrank_linear(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    terms: list[Thin],
    drop: list[float] | None = None,
    where: list[Where] | None = None,
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
        x2, y2 = _matrix(x), y.view(-1, y.shape[-1])  # a view or an error: y2 is added into
        for t, p, at in zip(terms, drop or [0.0] * n, where or [None] * n, strict=True):
            _add(x2, y2, _cast(t.A, x), _cast(t.B, x), t.scale, p, at)
        return y
    drop, where = drop or [0.0] * n, where or [None] * n
    spec = tuple((t.scale, p, at) for t, p, at in zip(terms, drop, where, strict=True))
    if x.shape[:-1].numel() >= MANY and all(at is None for at in where) and triton_lowrank.available(x):
        return _OnDevice.apply(x, W, b, spec, *(f for t in terms for f in (t.A, t.B)))  # type: ignore[no-any-return]
    return _LowRank.apply(x, W, b, spec, *(f for t in terms for f in (t.A, t.B)))  # type: ignore[no-any-return]


def _add_token(x: Tensor, y: Tensor, terms: list[Thin]) -> None:
    """y[n] += Σ s·B A x for one x[k]: vectors cost less than matrices of one row, and casting x less than the factors."""
    for A, B, s, _ in terms:
        if A.dtype is x.dtype:
            y.addmv_(_cast(B, x), torch.mv(A, x), alpha=s)
        elif A.dtype is torch.float32:
            y.copy_(y.float().addmv_(B.float(), torch.mv(A, x.float()), alpha=s))
        else:
            y.addmv_(_cast(B, x), torch.mv(_cast(A, x), x), alpha=s)


def _matrix(t: Tensor) -> Tensor:
    """[..., channels] as [rows, channels], to be read."""
    return t.reshape(-1, t.shape[-1])


def _cast(factor: Tensor, x: Tensor) -> Tensor:
    return factor if factor.dtype is x.dtype else factor.to(x.dtype)


def _add(
    x2: Tensor, y2: Tensor, A: Tensor, B: Tensor, s: float, p: float, where: Where
) -> tuple[Tensor, Tensor | None, int]:
    """y2 += s·drop(x2) Aᵀ Bᵀ on the rows `where`; returns h, the packed mask, and its seed."""
    xs, bits, seed, k = _drop(x2 if where is None else x2[where], p)
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


def again(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    """The gradients of a node once more, so that they can be differentiated themselves: those of its formula in plain
    operations. The nodes' own steps use what forward computed, through which no second derivative flows."""
    wanted = [t for t, needed in zip(inputs, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(formula(*inputs), wanted, dy, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def _plain_sum(
    spec: tuple[tuple[float, float, Where], ...], masks: Sequence[Tensor | None], seeds: Sequence[int], W: Tensor
) -> Callable[..., Tensor]:
    """The formula of `lowrank_linear`, but for the bias."""

    def formula(x: Tensor, *flat: Tensor) -> Tensor:
        y = F.linear(x, W)
        y2, x2 = _matrix(y), _matrix(x)
        for i, (s, p, where) in enumerate(spec):
            xs = x2 if where is None else x2[where]
            keep, k = _kept(xs, p, masks[i], seeds[i])
            xs = xs if keep is None else dropout.dropped(xs, keep)
            part = s * k * F.linear(F.linear(xs, _cast(flat[2 * i], x)), _cast(flat[2 * i + 1], x))
            at = torch.arange(len(y2), device=x.device)[slice(None) if where is None else where]
            y2 = y2.index_add(0, at, part)
        return y2.view(y.shape)

    return formula


def again_on_device(
    spec: tuple[tuple[float, float, Where], ...], W: Tensor, inputs: Sequence[Tensor], needs: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    """`again` for nodes whose masks exist only inside kernels."""
    if any(p for _, p, _ in spec):
        raise NotImplementedError(
            "Second derivatives with dropout on a GPU: set the dropout to 0, or compute them in eval mode."
        )
    return again(_plain_sum(spec, [None] * len(spec), [0] * len(spec), W), inputs, needs, dy)


def _drop(x: Tensor, p: float) -> tuple[Tensor, Tensor | None, int, float]:
    """(x where it is kept, the packed mask, its seed, the factor of what is kept)."""
    if not p:
        return x, None, 0, 1.0
    seed = int(torch.randint(2**62, (1,)).item())
    keep = dropout.draw(x.shape, p, seed, x.device)
    bits = dropout.pack(keep) if x.device.type == "cpu" else None
    return dropout.dropped(x, keep), bits, seed, 1 / (1 - dropout.rounded(p))


def _kept(x: Tensor, p: float, bits: Tensor | None, seed: int) -> tuple[Tensor | None, float]:
    """The mask that `_drop` drew for x, and its factor."""
    if not p:
        return None, 1.0
    keep = dropout.draw(x.shape, p, seed, x.device) if bits is None else dropout.unpack(bits, x.shape)
    return keep, 1 / (1 - dropout.rounded(p))


class _OnDevice(torch.autograd.Function):
    """The same node by Triton kernels: fewer passes over y, dy and dx, and dropout drawn where it is used."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, spec: tuple[tuple[float, float, Where], ...], *flat: Tensor
    ) -> Tensor:
        y = F.linear(x, W, b)
        x2, y2 = _matrix(x), y.view(-1, y.shape[-1])  # a view or an error: y2 is added into
        hidden, seeds = [], []
        for i, (s, p, _) in enumerate(spec):
            seeds.append(int(torch.randint(2**62, (1,)).item()) if p else 0)
            hidden.append(triton_lowrank.shrink(x2, flat[2 * i], p, seeds[-1]))
            triton_lowrank.expand_(y2, hidden[-1], flat[2 * i + 1], s)
        ctx.save_for_backward(x, W, *flat, *hidden)
        ctx.spec, ctx.seeds = spec, seeds
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        m = len(ctx.spec)
        x, W, *rest = ctx.saved_tensors
        flat, hidden = rest[: 2 * m], rest[2 * m :]
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            dx, *found = again_on_device(ctx.spec, W, (x, *flat), (needs[0], *needs[4:]), dy)
            return dx, None, None, None, *found
        dy2, x2 = _matrix(dy), _matrix(x)
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
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, spec: tuple[tuple[float, float, Where], ...], *flat: Tensor
    ) -> Tensor:
        y = F.linear(x, W, b)
        x2, y2 = _matrix(x), y.view(-1, y.shape[-1])  # a view or an error: y2 is added into
        hidden, masks, seeds = [], [], []
        for i, (s, p, where) in enumerate(spec):
            A, B = _cast(flat[2 * i], x), _cast(flat[2 * i + 1], x)
            h, bits, seed = _add(x2, y2, A, B, s, p, where)
            hidden.append(h)
            masks.append(bits)
            seeds.append(seed)
        ctx.save_for_backward(x, W, *flat, *hidden, *masks)
        ctx.spec, ctx.seeds = spec, seeds
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        m = len(ctx.spec)
        x, W, *rest = ctx.saved_tensors
        flat, hidden, masks = rest[: 2 * m], rest[2 * m : 3 * m], rest[3 * m :]
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            formula = _plain_sum(ctx.spec, masks, ctx.seeds, W)
            dx, *found = again(formula, (x, *flat), (needs[0], *needs[4:]), dy)
            return dx, None, None, None, *found
        dy2, x2 = _matrix(dy), _matrix(x)
        dx = dy2 @ W if needs[0] else None
        out: list[Tensor | None] = []
        for i, (s, p, where) in enumerate(ctx.spec):
            A, B = _cast(flat[2 * i], x), _cast(flat[2 * i + 1], x)
            xs, dys = (x2, dy2) if where is None else (x2[where], dy2[where])
            keep, k = _kept(xs, p, masks[i], ctx.seeds[i])
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


def scaled_linear(x: Tensor, W: Tensor, b: Tensor | None, term: Thin, p: float = 0.0) -> Tensor:
    """c ⊙ (x Wᵀ + s·x Aᵀ Bᵀ) + b with the row factors c[n] of the term: DoRA for the price of one base product.

    p: dropout, which acts on the change alone, y = x Wᵀ + b + (c − 1) ⊙ x̃ Wᵀ + c ⊙ s·x̃ Aᵀ Bᵀ with x̃ = drop(x), and
    takes a second base product.
    """
    assert term.rows is not None
    return _Scaled.apply(x, W, b, term.scale, p, term.A, term.B, term.rows.to(x.dtype))  # type: ignore[no-any-return]


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, s: float, p: float, A: Tensor, B: Tensor, c: Tensor
    ) -> Tensor:
        x2 = _matrix(x)
        xs, bits, seed, k = _drop(x2, p)
        z2 = F.linear(xs, W)
        y = F.linear(x, W, b) if p else None
        if y is not None:
            y.view(z2.shape).add_(z2, alpha=-k)
        h, *_ = _add(xs, z2, A.to(x.dtype), B.to(x.dtype), s, 0.0, None)
        if y is not None:
            y.view(z2.shape).addcmul_(z2, c, value=k)
        else:
            y = (z2 * c if b is None else torch.addcmul(b, z2, c)).view(*x.shape[:-1], len(W))
        ctx.save_for_backward(x, W, A, B, c, h, z2, bits)
        ctx.s, ctx.p, ctx.seed = s, p, seed
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, W, A, B, c, h, z2, bits = ctx.saved_tensors
        needs, x2 = ctx.needs_input_grad, _matrix(x)
        keep, k = _kept(x2, ctx.p, bits, ctx.seed)
        if torch.is_grad_enabled():

            def formula(x: Tensor, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
                dropped = x if keep is None else k * dropout.dropped(x, keep.view(x.shape))
                thin = ctx.s * F.linear(F.linear(dropped, A.to(x.dtype)), B.to(x.dtype))
                return F.linear(x, W) + (c - 1) * F.linear(dropped, W) + c * thin

            dx, *found = again(formula, (x, A, B, c), (needs[0], *needs[5:]), dy)
            return dx, None, None, None, None, *found
        dy2 = _matrix(dy)
        g = dy2 * c
        dc = _column_sums(dy2 * z2).mul_(k) if needs[7] else None
        dB = (g.T @ h).mul_(ctx.s * k) if needs[6] else None
        dh = (g @ B.to(x.dtype)).mul_(ctx.s * k) if needs[0] or needs[5] else None
        dA = dh.T @ (x2 if keep is None else dropout.dropped(x2, keep)) if needs[5] else None  # type: ignore[union-attr]
        dx = None
        if needs[0] and keep is None:
            dx = (g @ W).addmm_(dh, A.to(x.dtype))
        elif needs[0]:
            inner = (g.sub_(dy2).mul_(k) @ W).addmm_(dh, A.to(x.dtype))
            dx = (dy2 @ W).add_(dropout.dropped(inner, keep))  # type: ignore[arg-type]
        return None if dx is None else dx.view(x.shape), None, None, None, None, dA, dB, dc


def banked_linear(x: Tensor, W: Tensor, b: Tensor | None, term: Banks) -> Tensor:
    """x Wᵀ + b + s·((x Aᵀ ⊙ d) Bᵀ) ⊙ e for frozen A, B, W: gradients of the vectors alone."""
    A, B, d, e, s = term
    return _Banked.apply(x, W, b, _cast(A, x), _cast(B, x), d.to(x.dtype), s * e.to(x.dtype))  # type: ignore[no-any-return]


class _Banked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, d: Tensor, e: Tensor) -> Tensor:
        y = F.linear(x, W, b)
        h = _matrix(x) @ A.T  # [T, r]
        u = (h * d) @ B.T  # [T, n]
        y.view(u.shape).addcmul_(u, e)
        ctx.save_for_backward(x, W, A, B, d, e, h, u)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, W, A, B, d, e, h, u = ctx.saved_tensors
        needs, dy2 = ctx.needs_input_grad, _matrix(dy)
        if torch.is_grad_enabled():

            def formula(x: Tensor, d: Tensor, e: Tensor) -> Tensor:
                return F.linear(x, W) + F.linear(F.linear(x, A) * d, B) * e

            dx, dd, de = again(formula, (x, d, e), (needs[0], *needs[5:]), dy)
            return dx, None, None, None, None, dd, de
        de = _column_sums(dy2 * u) if needs[6] else None
        dx = dd = None
        if needs[0] or needs[5]:
            g = (dy2 * e) @ B
            dd = _column_sums(g * h) if needs[5] else None
            dx = (dy2 @ W).addmm_(g.mul_(d), A).view(*dy.shape[:-1], A.shape[1]) if needs[0] else None
        return dx, None, None, None, None, dd, de


def _column_sums(t: Tensor) -> Tensor:
    """t.sum(0), sooner."""
    return t.new_ones(len(t)) @ t


def row_norms(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """‖W + s·B A‖ of each row, in fp32 at least, without forming the sum:

        ‖w + s·b A‖² = ‖w‖² + 2s·(W Aᵀ)·b + s²·b (A Aᵀ) bᵀ.

    Rows that nearly cancel lose their digits this way; they are computed from the sum.
    """
    wide = torch.promote_types(A.dtype, torch.float32)
    A, B = A.to(wide), B.to(wide) * s
    own = torch.linalg.vector_norm(W, dim=1, dtype=wide).square()
    cross = (W @ A.to(W.dtype).T).to(wide)
    change = ((B @ (A @ A.T)) * B).sum(1)
    square = own + 2 * (cross * B).sum(1) + change
    if not torch.compiler.is_compiling() and not (W.is_cuda and torch.cuda.is_current_stream_capturing()):
        weak = square < 1e-2 * (own + change)
        if weak.any():
            exact = W[weak].to(wide) + B[weak] @ A
            square[weak] = exact.square().sum(1)
    return square.clamp_(min=0).sqrt_()


# -- merging --------------------------------------------------------------------------------------------------------------
TILE = 2**18  # entries of W that are widened at a time


def merged(W: Tensor, terms: list[Thin]) -> Tensor:
    """W + Σ sᵢ·Bᵢ Aᵢ as a new tensor of W's dtype; half precision is added up in fp32, a tile at a time."""
    if not _wide(W):
        return merge_tiles(W, terms, torch.empty_like(W))
    first, *rest = terms
    out = torch.addmm(W, first.B.to(W.dtype), first.A.to(W.dtype), alpha=first.scale)
    for t in rest:
        out.addmm_(t.B.to(W.dtype), t.A.to(W.dtype), alpha=t.scale)
    return out


def merge_tiles(W: Tensor, terms: list[Thin], out: Tensor) -> Tensor:
    rows = max(1, TILE // max(1, W.shape[1]))
    factors = [(t.A.float(), t.B.float(), t.scale) for t in terms]
    work = torch.empty(min(rows, len(W)), *W.shape[1:], dtype=torch.float32, device=W.device)
    for i in range(0, W.shape[0], rows):
        tile = work[: len(W) - i].copy_(W[i : i + rows])
        for A, B, s in factors:
            tile.addmm_(B[i : i + rows], A, alpha=s)
        out[i : i + rows] = tile
    return out


@torch.no_grad()
def merge_(W: Tensor, terms: list[Thin]) -> bool:
    """The same in place; False, and W as it was, unless each finite entry of W is sure to stay so."""
    limits, bound = torch.finfo(W.dtype), 0.0
    for t in terms:
        bound += abs(t.scale) * len(t.A) * _largest(t.B) * _largest(t.A)  # no entry of s·B A is larger
    # less than half the step between the dtype's largest numbers rounds none of them to inf: W need not be looked at
    if not bound < limits.max * limits.eps / 4 and not bound + _largest(W) < limits.max / 2:
        return False
    if _wide(W):
        for t in terms:
            W.addmm_(t.B.to(W.dtype), t.A.to(W.dtype), alpha=t.scale)
    else:
        merge_tiles(W, terms, W)
    return True


def _largest(W: Tensor) -> float:
    return max(abs(float(v)) for v in torch.aminmax(W)) if W.numel() else 0.0


def _wide(W: Tensor) -> bool:
    return W.dtype in (torch.float32, torch.float64)
