"""Random starts: the identity (B = 0), gaussian, orthogonal."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..contract.site import Site


def default(A: Tensor, B: Tensor, rng: torch.Generator, site: Site) -> None:
    """A uniform in ±1/√fan_in (Kaiming with a = √5), B = 0. For indexed layers A = 0 and B ~ N(0, 1)."""
    if site.geometry.indexed:
        nn.init.zeros_(A)
        nn.init.normal_(B, generator=rng)
    else:
        bound = 1 / math.sqrt(A.shape[1])
        A.uniform_(-bound, bound, generator=rng)
        B.zero_()


def gaussian(A: Tensor, B: Tensor, rng: torch.Generator, site: Site) -> None:
    """A ~ N(0, 1/r²), B = 0. For indexed layers A = 0 and B ~ N(0, 1), as without this start."""
    if site.geometry.indexed:
        default(A, B, rng, site)
    else:
        nn.init.normal_(A, std=1 / A.shape[0], generator=rng)
        nn.init.zeros_(B)


def noise(A: Tensor, B: Tensor, rng: torch.Generator, site: Site) -> None:
    """Both random, so that the adapter has an effect at once (tests, debugging)."""
    default(A, B, rng, site)
    zero = A if site.geometry.indexed else B
    bound = 1 / math.sqrt(zero.shape[1])
    nn.init.uniform_(zero, -bound, bound, generator=rng)


def orthogonal(A: Tensor, B: Tensor, rng: torch.Generator, site: Site) -> None:
    """Both factors start away from 0 with B A = 0: they use the even and the odd rows of one orthogonal matrix."""
    r = A.shape[0]
    if r % 2:
        raise ValueError(f"init_lora_weights='orthogonal' needs an even rank, got r={r} at {site.path}")
    q, _ = torch.linalg.qr(torch.randn(r, r, generator=rng))
    left = torch.randn(B.shape[0], r // 2, generator=rng) / 10
    right = torch.randn(A.shape[1], r // 2, generator=rng) / 10
    with torch.no_grad():
        B.copy_(left @ q[0::2])
        A.copy_((right @ q[1::2]).T)


random = {"default": default, "gaussian": gaussian, "noise": noise, "orthogonal": orthogonal}
