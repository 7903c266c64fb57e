"""Tucker factors of a kernel: a small core tensor between a matrix for the outputs and one for the inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The matrix [out, inputs·taps] of Σᵢⱼ core[i, j, taps] a[i, out] b[j, inputs] (FedPara, arXiv 2108.06098, prop. 3).

    core[r, r, *kernel] may have any number of kernel axes; the columns are ordered as those of a flattened kernel.
    """
    return torch.einsum("ijk,ip,jq->pqk", core.flatten(2), a, b).flatten(1)
