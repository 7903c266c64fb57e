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
    former: set[str]  # names that adapters no longer here had: their views are empty

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def active_methods(self, names: Sequence[str]) -> list[Method]:
        table = self.methods
        return [m for name in names if name in table for m in table[name]]

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
        return not self.merged_adapters and any(n in self.methods for n in names)


def has_adapted_layers(model: nn.Module) -> bool:
    return any(isinstance(m, AdaptedLayer) for m in tree(model, wrappers=True))
