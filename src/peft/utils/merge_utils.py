"""The arithmetic of `add_weighted_adapter` on lists of tensors, under upstream's names."""

from __future__ import annotations

from torch import Tensor

from ..core.load.combine import MERGERS
from ..core.load.combine_steps import (
    calculate_majority_sign_mask,
    disjoint_merge,
    magnitude_based_pruning,
    prune,
    random_pruning,
    reshape_weight_task_tensors,
)

__all__ = [
    "calculate_majority_sign_mask",
    "dare_linear",
    "dare_ties",
    "disjoint_merge",
    "magnitude_based_pruning",
    "magnitude_prune",
    "prune",
    "random_pruning",
    "reshape_weight_task_tensors",
    "task_arithmetic",
    "ties",
]


def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
    """Σ wᵢ tᵢ."""
    return MERGERS["linear"](task_tensors, weights.tolist(), None, "total")


def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """Σ wᵢ tᵢ over the entries of largest magnitude."""
    return MERGERS["magnitude_prune"](task_tensors, weights.tolist(), density, "total")


def ties(task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total") -> Tensor:
    """TIES (arXiv 2306.01708)."""
    return MERGERS["ties"](task_tensors, weights.tolist(), density, majority_sign_method)


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """DARE (arXiv 2311.03099)."""
    return MERGERS["dare_linear"](task_tensors, weights.tolist(), density, "total")


def dare_ties(
    task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    """DARE's pruning, TIES' election."""
    return MERGERS["dare_ties"](task_tensors, weights.tolist(), density, majority_sign_method)
