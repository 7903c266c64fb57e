"""y = x Wᵀ + b + Σᵢ dropᵢ(x) Aᵢᵀ Bᵢᵀ as one autograd node, for a frozen W.

Against the same formula in separate operations this saves the temporaries: each product is accumulated into y, dx with
`addmm_`. For backward it keeps x once (the caller's tensor, so layers that share their input share the copy), the thin
h = x Aᵀ, and for dropout a seed from which the mask is drawn again; nothing outside `save_for_backward`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def usable(x: Tensor) -> bool:
    """Whether the fused node may run: eager mode, no function transforms, no autocast (which would mix dtypes)."""
    if torch.compiler.is_compiling() or not torch.is_tensor(x) or not x.is_floating_point():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None and not torch.is_autocast_enabled(x.device.type)


def lowrank_linear(
    x: Tensor, W: Tensor, b: Tensor | None, factors: list[tuple[Tensor, Tensor]], dropout: list[float]
) -> Tensor:
    """x[..., k], W[n, k], b[n] or None, factors (A[r, k], B[n, r]), one dropout probability each."""
    flat = [t for pair in factors for t in pair]
    return _LowRankLinear.apply(x, W, b, tuple(dropout), *flat)  # type: ignore[no-any-return]


def mask(shape: torch.Size, p: float, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Bernoulli(1 − p)/(1 − p) from a seed. 15 random bits an entry: p is rounded to 1/32768."""
    n = shape.numel()
    rng = torch.Generator(device=device).manual_seed(seed)
    words = torch.empty((n + 3) // 4, dtype=torch.int64, device=device).random_(generator=rng)
    threshold = round(p * 32768)
    keep = (words.view(torch.int16)[:n] & 0x7FFF) >= threshold  # random_() leaves the sign bit of each word at 0
    return keep.view(shape).to(dtype) * (1 / (1 - threshold / 32768))


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, dropout: tuple[float, ...], *flat: Tensor) -> Tensor:
        y = F.linear(x, W, b)
        x2, y2 = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        hidden, seeds = [], []
        for i, p in enumerate(dropout):
            A, B = flat[2 * i].to(x.dtype), flat[2 * i + 1].to(x.dtype)
            seed = int(torch.randint(2**62, (1,)).item()) if p else 0
            h = (x2 * mask(x2.shape, p, seed, x.device, x.dtype) if p else x2) @ A.T  # [T, r]
            y2.addmm_(h, B.T)
            hidden.append(h)
            seeds.append(seed)
        ctx.save_for_backward(x, W, *flat, *hidden)
        ctx.dropout, ctx.seeds = dropout, seeds
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        m = len(ctx.dropout)
        x, W, *rest = ctx.saved_tensors
        flat, hidden = rest[: 2 * m], rest[2 * m :]
        dy2, x2 = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        needs = ctx.needs_input_grad
        dx = dy2 @ W if needs[0] else None
        out: list[Tensor | None] = []
        for i, p in enumerate(ctx.dropout):
            A, B = flat[2 * i].to(x.dtype), flat[2 * i + 1].to(x.dtype)
            dh = dy2 @ B if needs[0] or needs[4 + 2 * i] else None  # [T, r]
            keep = mask(x2.shape, p, ctx.seeds[i], x.device, x.dtype) if p else None
            dA = dB = None
            if needs[4 + 2 * i]:
                assert dh is not None
                dA = dh.T @ (x2 if keep is None else x2 * keep)
            if needs[5 + 2 * i]:
                dB = dy2.T @ hidden[i]
            if dx is not None and dh is not None:
                if keep is None:
                    dx.addmm_(dh, A)
                else:
                    dx.addcmul_(dh @ A, keep)
            out += [dA, dB]
        return None if dx is None else dx.view(x.shape), None, None, None, *out
