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
