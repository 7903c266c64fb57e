"""Matrices of low rank and Tucker factors of kernels: a small core between a matrix for outputs and one for inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank(a: Tensor, b: Tensor, core: Tensor | None = None) -> Tensor:
    """a b for a[out, r] and b[r, columns]; with a core, `tucker` of it."""
    return a @ b if core is None else tucker(core, a, b)


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The matrix [out, inputs·taps] of Σᵢⱼ core[i, j, taps] a[i, out] b[j, inputs] (FedPara, arXiv 2108.06098, prop. 3).

    core[r, r, *kernel] may have any number of kernel axes; the columns are ordered as those of a flattened kernel.
    """
    return torch.einsum("ijk,ip,jq->pqk", core.flatten(2), a, b).flatten(1)
