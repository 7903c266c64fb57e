"""The steps of `add_weighted_adapter` on stacked tensors, under the names that upstream's `merge_utils` gives them."""

from __future__ import annotations

import torch
from torch import Tensor

from .combine import dropped, largest


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """One weight per task, shaped to multiply the stacked tensors."""
    return weights.view(-1, *[1] * (task_tensors.dim() - 1))


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """The entries of largest magnitude, a share `density` of them; the others 0."""
    return largest(tensor, density)


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """Each entry kept with probability `density`, and divided by it with `rescale`."""
    return dropped(tensor, density) * (1.0 if rescale else density)


def prune(tensor: Tensor, density: float, method: str, rescale: bool = False) -> Tensor:
    """One of the two: `method` is "magnitude" or "random"."""
    if not 0 <= density <= 1:
        raise ValueError(f"density should be between 0 and 1, got {density}.")
    if method not in ("magnitude", "random"):
        raise ValueError(f"method should be 'magnitude' or 'random', got {method!r}.")
    return largest(tensor, density) if method == "magnitude" else random_pruning(tensor, density, rescale)


def calculate_majority_sign_mask(tensor: Tensor, method: str = "total") -> Tensor:
    """Where each task's entry has the sign that the tasks elect: by their sum, or by their number."""
    if method not in ("total", "frequency"):
        raise RuntimeError(f"method should be 'total' or 'frequency', got {method!r}.")
    votes = (tensor if method == "total" else tensor.sign()).sum(0)
    return tensor.sign() == torch.where(votes >= 0, 1.0, -1.0)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """Each entry's mean over the tasks that the mask names."""
    return (task_tensors * majority_sign_mask).sum(0) / majority_sign_mask.sum(0).clamp(min=1)
