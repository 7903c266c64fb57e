"""Methods whose ΔW is a sum of r parts, of which training prunes the least important (arXiv 2303.10512).

Every tensor of such a method has the parts along one axis. Importance is averaged over the steps, per entry, as
Ī = mean |p·∂p| and Ū = mean of |p·∂p|'s deviation from Ī; an entry's score is Ī·Ū, a part's the sum over the tensors of
its entries' mean scores. A pruned part has its gate at 0 and stays in memory; files hold the kept parts only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...contract.method import Method
from ...contract.site import Site


class Pruned(Method):
    """What such methods share; a subclass says when to observe and how many parts to keep."""

    part_axes: ClassVar[Mapping[str, int]]  # attribute -> the axis of the parts, 0 or 1
    gates: ClassVar[
        str
    ]  # the one with a number per part, 0 where it is pruned; a config's `rank_pattern` goes by its key
    own_r: int  # parts in memory
    path: str
    pattern: list[bool]  # which of the initial parts these are
    kept: Tensor  # [own_r] bool: those that are not pruned
    importance: dict[str, tuple[Tensor, Tensor]]  # attribute -> (Ī, Ū)

    def keep_all(self, r: int, site: Site) -> None:
        """The start: r parts, about which nothing is known."""
        self.set(own_r=r, path=site.path, pattern=[True] * r, importance={})
        self.register_buffer("kept", torch.ones(r, dtype=torch.bool), persistent=False)

    def rank(self) -> int:
        return int(self.kept.sum())

    # -- importance ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Average this step's |p·∂p| of every entry, and how much it deviates."""
        for name, p in self.named_parameters():
            if p.grad is None:
                raise RuntimeError(
                    f"update_and_allocate found no gradient at {self.path}.{name}: call it after backward and before "
                    "zero_grad."
                )
            now = (p * p.grad).abs()
            mean, deviation = self.importance.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
            mean = beta1 * mean.to(now) + (1 - beta1) * now
            self.importance[name] = mean, beta2 * deviation.to(now) + (1 - beta2) * (now - mean).abs()

    def scores(self) -> Tensor:
        """One number per part, [r]."""
        found = [torch.mul(*self.importance[name]).mean(1 - axis) for name, axis in self.part_axes.items()]
        return sum(found[1:], start=found[0])

    # -- pruning ------------------------------------------------------------------------------------------------------
    @staticmethod
    def prune(methods: Mapping[str, Pruned], excess: int) -> None:
        """Keep all but the `excess` least important parts of all sites."""
        if excess < 1:
            return
        scores = {disk_path: m.scores().float().cpu() for disk_path, m in methods.items()}
        threshold = torch.cat(list(scores.values())).kthvalue(excess).values
        for disk_path, m in methods.items():
            m.kept = (scores[disk_path] > threshold).to(m.kept.device)

    @torch.no_grad()
    def mask(self) -> None:
        self.tensor(self.gates)[~self.kept] = 0.0

    @staticmethod
    def patterns(methods: Mapping[str, Pruned]) -> dict[str, list[bool]]:
        """Which of the initial parts are kept, as a config's `rank_pattern` says it."""
        return {f"{disk_path}.{m.table.own[m.gates]}": m.full_pattern() for disk_path, m in methods.items()}

    def full_pattern(self) -> list[bool]:
        """`kept` in terms of the initial parts, of which earlier pruning may have dropped some."""
        left = iter(self.kept.tolist())
        return [held and next(left) for held in self.pattern]

    # -- in a checkpoint ----------------------------------------------------------------------------------------------
    def progress(self) -> dict[str, Any]:
        importance = {n: [t.detach().cpu() for t in pair] for n, pair in self.importance.items()}
        return {"kept": self.kept.cpu(), "pattern": list(self.pattern), "importance": importance}

    def take_up(self, progress: dict[str, Any]) -> None:
        at = self.kept.device
        self.kept = progress["kept"].to(at)
        importance = {n: (mean.to(at), deviation.to(at)) for n, (mean, deviation) in progress["importance"].items()}
        self.set(pattern=list(progress["pattern"]), importance=importance)

    # -- on disk ------------------------------------------------------------------------------------------------------
    def stored(self, attr: str, tensor: Tensor) -> Tensor:
        return tensor[:, self.kept] if self.part_axes[attr] else tensor[self.kept]

    def resize(self, state: dict[str, Tensor]) -> None:
        """Take over the parts that a file's pruning left."""
        gates = state.get(self.gates)
        r = self.own_r if gates is None else gates.shape[0]
        if r == self.own_r or r > len(self.pattern):
            return
        known: Mapping[str, list[bool]] = self.config.rank_pattern or {}
        found = next(
            (p for k, p in known.items() if k.startswith(f"{self.path}.{self.table.own[self.gates]}") and sum(p) == r),
            None,
        )
        self.set(own_r=r, pattern=[bool(x) for x in found] if found else [True] * r)
        self.kept = torch.ones(r, dtype=torch.bool, device=self.kept.device)
        for name, axis in self.part_axes.items():
            old = self.tensor(name)
            shape = list(old.shape)
            shape[axis] = r
            setattr(self, name, nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad))
