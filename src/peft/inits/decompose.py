"""Starts from factors of the frozen weight: PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract.site import Site


def _weight(site: Site, r: int) -> Tensor:
    W = site.read().detach().to(torch.float32)
    if r > min(W.shape):
        raise ValueError(
            f"r={r} exceeds the rank of the weight at {site.path}, {tuple(W.shape)}: this start needs r <= {min(W.shape)}"
        )
    return W


def pissa(A: Tensor, B: Tensor, rng: torch.Generator, site: Site, scale: float, argument: str) -> tuple[Tensor, Tensor]:
    """The r largest singular triplets: A = √(Σ/s) Vᵀ, B = U √(Σ/s), so that s B A is the best rank-r part of W.

    `pissa_niter_N` uses N power iterations of a randomised SVD, drawn from `rng`.
    """
    r = A.shape[0]
    W = _weight(site, r)
    if argument:
        U, S, Vh = _randomised_svd(W, r, int(argument), rng)
    else:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[:r] / scale).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def _randomised_svd(W: Tensor, r: int, iterations: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    k = min(2 * r, *W.shape)
    omega = torch.randn(W.shape[1], k, generator=rng).to(W.device)
    q, _ = torch.linalg.qr(W @ omega)
    for _ in range(iterations):
        q, _ = torch.linalg.qr(W.T @ q)
        q, _ = torch.linalg.qr(W @ q)
    U, S, Vh = torch.linalg.svd(q.T @ W, full_matrices=False)
    return q @ U, S, Vh


def olora(A: Tensor, B: Tensor, rng: torch.Generator, site: Site, scale: float, argument: str) -> tuple[Tensor, Tensor]:
    """W = Q R: B = Q[:, :r], A = R[:r]."""
    r = A.shape[0]
    q, upper = torch.linalg.qr(_weight(site, r))
    return upper[:r], q[:, :r]


from_weight = {"pissa": pissa, "pissa_niter_": pissa, "olora": olora}
