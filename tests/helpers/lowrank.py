"""Tensors for the fused nodes, and the mask that a seed draws."""

from __future__ import annotations

import torch

from peft.kernels import dropout

CPU = torch.device("cpu")


def mask(shape, p, seed):
    """The factor that dropout puts on each entry."""
    return dropout.draw(torch.Size(shape), p, seed, CPU) / (1 - dropout.rounded(p))


def setting(dtype=torch.float64, batch=(3, 5), k=7, n=6, ranks=(2, 3)):
    rng = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=rng, dtype=dtype)

    x = make(*batch, k).requires_grad_()
    W, b = make(n, k), make(n)
    factors = [(make(r, k).requires_grad_(), make(n, r).requires_grad_()) for r in ranks]
    return x, W, b, factors
