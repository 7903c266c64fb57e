"""Tensors and tolerances for the Triton kernels."""

from __future__ import annotations

import torch


def close(a, b, tol=2e-5):
    assert a.shape == b.shape
    largest = b.abs().max().item() if b.numel() else 0.0
    torch.testing.assert_close(a, b, rtol=tol, atol=tol * max(1.0, largest))


def draw(T, k, n, r, device="cpu"):
    g = torch.Generator().manual_seed(T * 7 + k * 5 + n * 3 + r)
    shapes = dict(x=(T, k), A=(r, k), B=(n, r), y=(T, n), dy=(T, n), dx=(T, k))
    return {name: torch.randn(shape, generator=g).to(device) for name, shape in shapes.items()}
