"""Hard-concrete gates: numbers in [0, 1] that are exactly 0 or 1 with positive probability, and differentiable.

A gate with log-odds α is z = clip(σ(ln u − ln(1 − u) + α)·(r − l) + l, 0, 1) for uniform u and a stretch (l, r) with
l < 0 and r > 1: the temperature is 1 (arXiv 1712.01312, section 2.2; diff pruning, arXiv 2012.07463).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gates(log_odds: Tensor, low: float, high: float, *, noisy: bool) -> Tensor:
    """z for each of the log-odds (any shape): a draw from torch's generator, or without noise the value at u = 1/2."""
    if noisy:
        u = torch.rand_like(log_odds, dtype=torch.promote_types(log_odds.dtype, torch.float32)).clamp(1e-6, 1 - 1e-6)
        log_odds = log_odds + torch.log(u) - torch.log1p(-u)
    return (torch.sigmoid(log_odds) * (high - low) + low).clamp(0, 1)


def open_probability(log_odds: Tensor, low: float, high: float) -> Tensor:
    """P(z ≠ 0) = σ(α − ln(−l/r)) for each of the log-odds: their sum is the expected L0 norm."""
    return torch.sigmoid(log_odds - math.log(-low / high))
