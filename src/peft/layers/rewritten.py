"""What the kinds share whose layers cannot take a changed weight where it lies: a merge puts a plain layer in their place.

The layer itself is kept, untouched, for unmerging.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from ..contract.kind import LayerKind

C = TypeVar("C", bound=nn.Module)


class Rewritten(LayerKind[C]):
    replaces = True

    def parameters(self, module: C) -> dict[str, Tensor]:
        bias = self.bias(module)
        W = self.native(self.read(module), module)
        return {"weight": W} if bias is None else {"weight": W, "bias": bias}

    def merge_refusal(self, module: C) -> str:
        return ""

    def buffers(self, module: C) -> dict[str, Tensor]:
        return {}  # what the weight is computed from, not a state of its own

    def swappable(self, module: C) -> bool:
        return False  # its parameters are not the weight

    def keep(self, module: C, names: list[str]) -> None:
        """Nothing: writing makes another layer and leaves this one as it is."""

    def restore(self, module: C, kept: object) -> nn.Module:
        return module

    def untie(self, module: C, names: list[str], tied: frozenset[int] | set[int]) -> bool:
        return False
