"""What fused kernels add to a base product, as bare data."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Thin(NamedTuple):
    """ΔW = s·B A, with A[r, k] and B[n, r] as they are kept."""

    A: Tensor
    B: Tensor
    scale: float = 1.0
    rows: Tensor | None = None  # c[n]: W' = c ⊙ (W + ΔW) by rows


class Banks(NamedTuple):
    """ΔW = s·diag(e) B diag(d) A, of which the vectors d[r] and e[n] are trained."""

    A: Tensor
    B: Tensor
    d: Tensor
    e: Tensor
    scale: float = 1.0
