"""Diff pruning: W' = W + z ⊙ δ with a mask z that learns to be mostly 0 (arXiv 2012.07463).

z is hard-concrete with log-odds α, stretched over (l, r): in training z = clip(σ(ln u − ln(1 − u) + α)·(r − l) + l, 0, 1)
with u uniform, in evaluation the same without noise; the loss gets λ Σ σ(α − ln(−l/r)), the expected number of
nonzero entries. `structured` multiplies by one more such mask per tensor. Start: δ = 0.

After that training `prune_diff(model)` keeps the largest |z δ| of all tensors together, `density` of them, as values at
fixed positions, which can be trained on; only then is the adapter small.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TunerConfig
from ..config_fields import own_field, require
from ..contract.capabilities import Penalised
from ..contract.site import Site
from ..contract.tensors import TensorTable
from ..core.forms.copies import put, take
from ..core.forms.sparse import SparseCopies, top_entries
from ..maths.hard_concrete import gates, open_probability
from ..measure.examples import originals

__all__ = ["DiffPruningConfig", "prune_diff"]


@dataclass
class DiffPruningConfig(TunerConfig):
    """Diff pruning (arXiv 2012.07463).

    density: share of the targeted modules' parameters that `prune_diff` keeps. sparsity_penalty: λ. alpha_init: the
    log-odds' start. concrete_lower, concrete_upper: l < 0 and r > 1. structured: a mask per tensor, too. pruned: set by
    `prune_diff`. target_modules: all linear layers by default.
    """

    own_type = "DIFFPRUNING"
    density: float = own_field(0.005)
    sparsity_penalty: float = own_field(1.25e-7)
    alpha_init: float = own_field(5.0)
    concrete_lower: float = own_field(-1.5)
    concrete_upper: float = own_field(1.5)
    structured: bool = own_field(True)
    pruned: bool = own_field(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "sparsity_penalty", 0)
        if not 0 < self.density <= 1:
            raise ValueError(f"`density` is the share of parameters to keep, in (0, 1]; got {self.density}.")
        if not (self.concrete_lower < 0 and self.concrete_upper > 1):
            raise ValueError(
                "The mask can be exactly 0 and 1 only if concrete_lower < 0 and concrete_upper > 1; got "
                f"{self.concrete_lower} and {self.concrete_upper}."
            )


class DiffPruning(Penalised, SparseCopies):
    peft_type = "DIFFPRUNING"
    config_class = DiffPruningConfig
    summary = "Learns a sparse difference to the frozen weights under an L0 penalty, then prunes it."
    formula = "W' = W + z ⊙ δ, z hard-concrete"
    paper = "arXiv 2012.07463"
    prefix = "diff_"
    holder = "diff_kept"
    examples = ({}, {"structured": False}, {"pruned": True, "density": 0.25})

    def __init__(self, config: DiffPruningConfig, site: Site) -> None:
        super().__init__(config, site)
        if config.pruned:
            self.make_room(config.density, site.device, site.dtype)
            return
        trees = ("diff_delta", "diff_alpha", *(("diff_group",) if config.structured else ()))
        for tree in trees:
            self.add_module(tree, nn.Module())
            for name, shape in self.shapes.items():
                put(getattr(self, tree), name, site.empty(*(() if tree == "diff_group" else shape)))
        keys = {k: k for k in (f"{tree}.{n}" for tree in trees for n in self.shapes)}
        self.set(table=TensorTable(keys=keys, own=keys))

    @property
    def pruned(self) -> bool:
        return self.holder in self._modules

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        if self.pruned:
            return super().reset(rng, site)
        for key in self.table.keys:
            take(self, key).fill_(0 if key.startswith("diff_delta.") else self.config.alpha_init)

    @property
    def stretch(self) -> tuple[float, float]:
        """(l, r)."""
        return self.config.concrete_lower, self.config.concrete_upper

    def mask(self, alpha: Tensor) -> Tensor:
        """z for log-odds α: a draw in training, its noiseless value in evaluation."""
        return gates(alpha, *self.stretch, noisy=self.training)

    def difference(self, name: str) -> Tensor:
        """z ⊙ δ of one tensor."""
        change = self.mask(take(self.diff_alpha, name)) * take(self.diff_delta, name)
        return change * self.mask(take(self.diff_group, name)) if self.config.structured else change

    def replace(self, name: str, P: Tensor) -> Tensor:
        return super().replace(name, P) if self.pruned else P + self.difference(name).to(P.dtype)

    def penalty(self) -> Tensor | None:
        """λ times the expected number of nonzero entries of z."""
        if self.pruned:
            return None
        expected = []
        for name in self.shapes:
            nonzero = open_probability(take(self.diff_alpha, name), *self.stretch)
            if self.config.structured:
                nonzero = nonzero * open_probability(take(self.diff_group, name), *self.stretch)
            expected.append(nonzero.sum())
        return self.config.sparsity_penalty * torch.stack(expected).sum()

    def resize(self, state: dict[str, Tensor]) -> None:
        if self.pruned:
            super().resize(state)


@torch.no_grad()
def prune_diff(model: nn.Module, density: float | None = None, adapter_name: str = "default") -> dict[str, int]:
    """Keep the largest entries of the learned difference, a share `density` of all, and drop the masks.

    density: the config's by default. The adapter's parameters are new ones: make a new optimiser to train them further.
    Returns the number of kept entries by module.
    """
    roster = model.roster
    roster.known([adapter_name])
    adapter = roster.adapters[adapter_name]
    methods = {disk_path: m for disk_path, m in adapter.methods if isinstance(m, DiffPruning)}
    if not methods or any(m.pruned for m in methods.values()):
        raise ValueError(f"Adapter {adapter_name!r} holds no learned difference to prune, or is pruned already.")
    share = adapter.config.density if density is None else density
    training = {disk_path: m.training for disk_path, m in methods.items()}
    for m in methods.values():
        m.eval()
    changes = {(disk_path, n): m.difference(n) for disk_path, m in methods.items() for n in m.shapes}
    chosen = top_entries({key: c.abs() for key, c in changes.items()}, share)
    base = originals(model)
    found = dict.fromkeys(methods, 0)
    for disk_path, m in methods.items():
        some = next(m.parameters())
        m.make_room(share, some.device, some.dtype)
        for n, P in base[m]().items():
            if n in m.shapes:
                at = chosen[disk_path, n]
                m.choose(n, at, P.to(some.dtype) + changes[disk_path, n])
                found[disk_path] += len(at)
        for tree in ("diff_delta", "diff_alpha", "diff_group"):
            m._modules.pop(tree, None)
        m.train(training[disk_path])
    adapter.config.density, adapter.config.pruned = share, True
    roster.set_trainable(adapter_name, adapter_name in roster.training)
    return found
