"""A base layer with adapters, as everything below the wrapper itself (`core/adapted`) may know it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ...contract.geometry import Geometry
from ...contract.kind import LayerKind
from ...contract.method import Method
from ...contract.site import Op
from ...contract.tree import AdapterContainer, Wrapper, tree
from .roster import Roster


class AdaptedLayer(Wrapper):
    """What hangs in the place of a base layer, and the adapters there by name."""

    roster: Roster
    kind: LayerKind
    path: str
    geometry: Geometry
    op: Op
    adapters: AdapterContainer
    methods: dict[str, tuple[Method, ...]]
    merged_adapters: list[str]
    off: (
        tuple[object, frozenset[str]] | None
    )  # what is switched off here alone, for as long as the roster has that object
    former: set[str]  # names that adapters no longer here had: their views are empty

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def active_methods(self, names: Sequence[str]) -> list[Method]:
        table = self.methods
        found = [m for name in names if name in table for m in table[name]]
        return found if self.off is None else self._on(found)

    def _on(self, methods: Sequence[Method]) -> list[Method]:
        """Those of the methods that are not switched off here."""
        off = self.switched_off
        if "" in off:
            return []
        there = self.adapters._modules
        hidden = {id(m) for field in off if (c := there.get(f"%{field}")) is not None for m in c._modules.values()}
        return [m for m in methods if id(m) not in hidden]

    @property
    def switched_off(self) -> frozenset[str]:
        """The config fields whose companions are switched off at this layer alone; "" for all that hangs here."""
        return self.off[1] if self.off is not None and self.off[0] is self.roster.off_by_layer else frozenset()

    def compose(self, methods: Sequence[Method], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(W', b') of these methods together."""
        raise NotImplementedError(f"{type(self).__name__}.compose")

    def nested_methods(self) -> Iterator[Method]:
        return (inner for methods in self.methods.values() for m in methods for inner in m.nested())

    @property
    def acting(self) -> bool:
        """Whether the next forward differs from the base layer's."""
        mix = self.roster.mix
        names = mix.active if mix.rows is None else mix.rows.distinct
        return not self.merged_adapters and bool(self.active_methods(names))


def has_adapted_layers(model: nn.Module) -> bool:
    return any(isinstance(m, AdaptedLayer) for m in tree(model, wrappers=True))
