"""Which trained parameters stand in which factor of a delta, asked of the delta itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..contract.capabilities import TwoFactors
from ..contract.method import Method
from ..core.acting.on_model import roster_of
from ..core.acting.roster import Roster


def adapters_of(model: nn.Module) -> Roster:
    roster = roster_of(model)
    if roster is None or not roster.adapters:
        raise ValueError("This model has no adapters to train.")
    return roster


def methods(model: nn.Module) -> Iterator[Method]:
    """Every adapter's methods and what they wrap."""
    for adapter in adapters_of(model).adapters.values():
        for _, outer in adapter.methods:
            yield from outer.nested()


def factors(method: Method) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that the factor next to x depends on, and those of the last factor; empty unless there are two."""
    own = [p for p in method.parameters() if p.is_floating_point()]
    if method.form != "delta" or not own:
        return [], []
    frozen = [p for p in own if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        with torch.enable_grad():
            chain = method("delta")
            return (_inside(chain[0], own), _inside(chain[-1], own)) if len(chain) > 1 else ([], [])
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _inside(factor: Tensor, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    grads = torch.autograd.grad(factor.sum(), parameters, allow_unused=True, retain_graph=True)
    return [p for p, g in zip(parameters, grads, strict=True) if g is not None]


@dataclass
class TrainedFactors:
    """A method whose ΔW is s·B A with A[r, fan_in] and B[out, r] parameters of their own."""

    method: Method
    A: nn.Parameter
    B: nn.Parameter

    @property
    def strength(self) -> float:
        assert isinstance(self.method, TwoFactors)
        return self.method.two_factors()[2]


def pairs(model: nn.Module) -> list[TrainedFactors]:
    """All of them, of adapters that train."""
    found = []
    for m in methods(model):
        if isinstance(m, TwoFactors) and any(p.requires_grad for p in m.parameters()):
            first, last = factors(m)
            if len(first) == len(last) == 1 and first[0].shape[0] == last[0].shape[-1]:
                found.append(TrainedFactors(m, first[0], last[0]))
    if not found:
        raise ValueError("No adapter that trains has two trainable factors A and B with ΔW = s·B A.")
    return found
