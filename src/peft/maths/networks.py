"""Pieces of small networks: affine maps, and the functions between them by the names that configs give them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "linear": lambda h: h,
}


def affine(h: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """W h + b over the last axis of h[..., n], for W[m, n] and b[m], computed in h's precision."""
    return F.linear(h, W.to(h.dtype), b.to(h.dtype))


def fold_affine(W: Tensor, b: Tensor | None, M: Tensor, shift: Tensor, *, table: bool) -> tuple[Tensor, Tensor | None]:
    """The (W', b') of M (W x + b) + shift for W[out, in], b[out], M[out, out] and shift[out].

    table: x picks one column of W, so that the columns take the shift and b stays as it is.
    """
    if table:
        return M @ W + shift[:, None], b
    return M @ W, shift if b is None else M @ b.to(M.dtype) + shift
