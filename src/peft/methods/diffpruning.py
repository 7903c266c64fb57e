"""Diff pruning: W' = W + z ⊙ δ with a mask z that learns to be mostly 0 (arXiv 2012.07463).

z is hard-concrete with log-odds α, stretched over (l, r): in training z = clip(σ(ln u − ln(1 − u) + α)·(r − l) + l, 0, 1)
with u uniform, in evaluation the same without noise; the loss gets λ Σ σ(α − ln(−l/r)), the expected number of
nonzero entries. `structured` multiplies by one more such mask per tensor. Start: δ = 0.

After that training `prune_diff(model)` keeps the largest |z δ| of all tensors together, `density` of them, as values at
fixed positions, which can be trained on; only then is the adapter small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from ..config_fields import own_field, ranged
from ..contract.capabilities import Penalised
from ..contract.site import Site
from ..core.forms.copies import take
from ..core.forms.differences import PrunedConfig, PrunedDifference, prune
from ..maths.hard_concrete import gates, open_probability

__all__ = ["DiffPruningConfig", "prune_diff"]


@dataclass
class DiffPruningConfig(PrunedConfig):
    """Diff pruning (arXiv 2012.07463).

    density: share of the targeted modules' parameters that `prune_diff` keeps. sparsity_penalty: λ. alpha_init: the
    log-odds' start. concrete_lower, concrete_upper: l < 0 and r > 1. structured: a mask per tensor, too. pruned: set by
    `prune_diff`. target_modules: all linear layers by default.
    """

    own_type = "DIFFPRUNING"
    sparsity_penalty: float = ranged(1.25e-7, 0, own=True)
    alpha_init: float = own_field(5.0)
    concrete_lower: float = own_field(-1.5)
    concrete_upper: float = own_field(1.5)
    structured: bool = own_field(True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.concrete_lower < 0 and self.concrete_upper > 1):
            raise ValueError(
                "The mask can be exactly 0 and 1 only if concrete_lower < 0 and concrete_upper > 1; got "
                f"{self.concrete_lower} and {self.concrete_upper}."
            )


class DiffPruning(Penalised, PrunedDifference):
    peft_type = "DIFFPRUNING"
    config_class = DiffPruningConfig
    summary = "Learns a sparse difference to the frozen weights under an L0 penalty, then prunes it."
    formula = "W' = W + z ⊙ δ, z hard-concrete"
    paper = "arXiv 2012.07463"
    prefix = "diff_"
    holder = "diff_kept"
    examples = ({}, {"structured": False}, {"pruned": True, "density": 0.25})

    diff_delta: nn.Module  # trees of δ, of the log-odds of its mask, and of those of the tensors' masks
    diff_alpha: nn.Module
    diff_group: nn.Module

    def learned(self, site: Site) -> Mapping[str, Mapping[str, nn.Parameter]]:
        trees = {t: {n: site.empty(*s) for n, s in self.shapes.items()} for t in ("diff_delta", "diff_alpha")}
        return trees | ({"diff_group": {n: site.empty() for n in self.shapes}} if self.config.structured else {})

    def start(self, rng: torch.Generator) -> None:
        for key in self.table.keys:
            take(self, key).fill_(0 if key.startswith("diff_delta.") else self.config.alpha_init)

    @property
    def stretch(self) -> tuple[float, float]:
        """(l, r)."""
        return self.config.concrete_lower, self.config.concrete_upper

    def mask(self, alpha: Tensor) -> Tensor:
        """z for log-odds α: a draw in training, its noiseless value in evaluation."""
        return gates(alpha, *self.stretch, noisy=self.training)

    def log_odds(self, name: str) -> list[Tensor]:
        """α of the masks that multiply a tensor's δ."""
        trees = [self.diff_alpha, self.diff_group] if self.config.structured else [self.diff_alpha]
        return [take(tree, name) for tree in trees]

    def difference(self, name: str) -> Tensor:
        """z ⊙ δ of one tensor."""
        change = take(self.diff_delta, name)
        for alpha in self.log_odds(name):
            change = self.mask(alpha) * change
        return change

    def penalty(self) -> Tensor | None:
        """λ times the expected number of nonzero entries of z."""
        if self.pruned:
            return None
        nonzero = ([open_probability(alpha, *self.stretch) for alpha in self.log_odds(n)] for n in self.shapes)
        return self.config.sparsity_penalty * torch.stack([reduce(torch.mul, p).sum() for p in nonzero]).sum()


def prune_diff(model: nn.Module, density: float | None = None, adapter_name: str = "default") -> dict[str, int]:
    """Keep the largest entries of the learned difference, a share `density` of all, and drop the masks.

    density: the config's by default. The adapter's parameters are new ones: make a new optimiser to train them further.
    Returns the number of kept entries by module.
    """
    return prune(model, adapter_name, DiffPruning, density)
