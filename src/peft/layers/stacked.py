"""Stand-ins for modules whose parameters are matrices or stacks of matrices: parts, who acts on them, keys on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.method import Method
from ..contract.tree import Composite, Part
from ..core.acting.adapted_layer import AdaptedLayer
from ..core.acting.raw_reads import asks_for_parameter, reader
from ..core.acting.roster import Roster
from .slice import acting_names, native
from .weight_slice import WeightSlice


class Stacked(Composite):
    """A stand-in whose parts are the matrices of some parameters: `name` for a 2-D one, `name[e]` for each of a stack.

    On disk upstream nests one wrapper for each adapted parameter, in the module's order, the last one outermost: the
    keys of the others stand below `base_layer.`, and the tensors of a stack are one tensor (`Stored.stack`).
    """

    def __init__(self, module: nn.Module, slices: dict[str, list[WeightSlice]]) -> None:
        super().__init__()
        self.base_layer = module
        self.slices = nn.Module()
        self.slices._modules.update({n: nn.ModuleList(s) for n, s in slices.items()})  # any name a parameter may have
        self.single = {n: s[0].index is None for n, s in slices.items()}
        self.flipped = False  # whether the file holds each ΔW transposed
        self.training = module.training

    def __getattr__(self, name: str) -> Any:
        """What reads a parameter instead of calling the module gets what the module computes with."""
        if name in self.__dict__.get("single", ()) and not asks_for_parameter():
            parts = list(self.of(name))
            if names := acting_names(parts, reader()):
                whole = [native(p, names) for p in parts]
                return whole[0] if self.single[name] else torch.stack(whole)
        return super().__getattr__(name)

    def of(self, name: str) -> nn.ModuleList:
        return self.slices._modules[name]  # type: ignore[return-value]

    def part_names(self, name: str) -> list[str]:
        return [name] if self.single[name] else [f"{name}[{e}]" for e in range(len(self.of(name)))]

    def parts(self) -> dict[str, Part]:
        return {
            part: Part(self.of(name), str(e), part)
            for name in self.single
            for e, part in enumerate(self.part_names(name))
        }

    # -- which adapters act ---------------------------------------------------------------------------------------------
    def adapted(self, name: str | None = None) -> list[AdaptedLayer]:
        names = [name] if name else self.single
        return [m for n in names for m in self.of(n) if isinstance(m, AdaptedLayer)]

    def acting(self) -> Roster | None:
        """The roster, if any of its acting adapters has something here."""
        roster = next((x.roster for x in self.adapted() if x.acting), None)  # what is merged is in the parameter
        if roster is None:
            return None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            roster.check_recompute()
        return roster

    # -- on disk ----------------------------------------------------------------------------------------------------------
    def _nest(self, methods: dict[str, Method]) -> dict[str, str]:
        present = [n for n in self.single if any(p in methods for p in self.part_names(n))]
        return {n: "base_layer." * (len(present) - 1 - i) for i, n in enumerate(present)}

    def to_disk(self, state: dict[str, Tensor], methods: dict[str, Method]) -> dict[str, Tensor]:
        out = {}
        for name, prefix in self._nest(methods).items():
            parts = self.part_names(name)
            like = methods[parts[0]]
            for key in [k.removeprefix(parts[0] + ".") for k in state if k.startswith(parts[0] + ".")]:
                tensors = [state[f"{p}.{key}"] for p in parts]
                target = key
                if self.flipped and key in like.table.turned:
                    target, tensors = like.table.turned[key], [t.T for t in tensors]
                out[prefix + target] = (
                    tensors[0] if self.single[name] else _stack(tensors, like.table.stacks.get(target))
                )
        return out

    def from_disk(self, state: dict[str, Tensor], methods: dict[str, Method]) -> dict[str, Tensor]:
        out = dict(state)
        for name, prefix in self._nest(methods).items():
            parts = self.part_names(name)
            like = methods[parts[0]]
            for key in like.table.keys.values():
                flip = self.flipped and key in like.table.turned
                source = like.table.turned[key] if flip else key
                whole = out.pop(prefix + source, None) if prefix + source in state else None
                if whole is None:
                    continue
                tensors = [whole] if self.single[name] else _unstack(whole, len(parts), like.table.stacks.get(source))
                out.update({f"{p}.{key}": t.T if flip else t for p, t in zip(parts, tensors, strict=True)})
        return out


def _stack(tensors: list[Tensor], how: tuple[int, int] | None) -> Tensor:
    """One tensor with a new axis for the expert; `how`: (where that axis goes, which axis is joined with the next)."""
    if how is None:
        return torch.stack(tensors)
    axis, joined = how
    return torch.stack(tensors, axis).flatten(joined, joined + 1)


def _unstack(whole: Tensor, experts: int, how: tuple[int, int] | None) -> Sequence[Tensor]:
    if how is None:
        return whole.unbind(0)
    axis, joined = how
    if whole.shape[joined] % experts:
        raise ValueError(f"a stacked tensor of shape {tuple(whole.shape)} does not divide among {experts} experts")
    sizes = (experts, -1) if axis == joined else (-1, experts)
    return whole.unflatten(joined, sizes).unbind(axis)
