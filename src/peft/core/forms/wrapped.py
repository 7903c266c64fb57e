"""A method around any delta: what it does not state itself is the wrapped method's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ...contract.capabilities import Derives, Penalised
from ...contract.method import Method
from ...contract.site import Site
from ...contract.tensors import Stored


class Around(Derives, Method):
    """Put around a config's own delta where the config asks for it by the field `wraps`; a variant is its maths and fields.

    A subclass states `own_tensors`, `start` and what it makes of the delta: `weight`, or `delta`, and if they are faster
    `add` and `fused_term`.
    """

    wraps: ClassVar[str] = ""  # the config field
    inner: Method

    def __init__(self, config: object, site: Site, inner: Method) -> None:
        super().__init__(config, site)
        self.inner = inner
        self.set(peft_type=inner.peft_type, prefix=inner.prefix)
        self.set(table=inner.table.around(self.own_tensors()))
        self.create(site)

    def own_tensors(self) -> Mapping[str, Stored]:
        """What is kept besides the wrapped method's tensors."""
        return {}

    def start(self, rng: torch.Generator, site: Site) -> None:
        """Draw the initial values of these; the wrapped method has its own."""

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        self.inner.reset(rng, site)
        self.start(rng, site)

    @property
    def derives(self) -> bool:
        return isinstance(self.inner, Derives) and self.inner.derives

    def derive(self, rng: torch.Generator, site: Site) -> None:
        if isinstance(self.inner, Derives):
            self.inner.derive(rng, site)

    @property
    def multiplier(self) -> float:
        """A factor on the wrapped method's effect, as set_scale means it."""
        return self.inner.multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        if "inner" in self._modules:
            self.inner.multiplier = value

    @property
    def dropout(self) -> float:
        return self.inner.dropout

    @dropout.setter
    def dropout(self, value: float) -> None:
        self.inner.dropout = value

    def nested(self) -> tuple[Method, ...]:
        return (self, *self.inner.nested())

    def bias_change(self) -> Tensor | None:
        return self.inner.bias_change()

    def penalty(self) -> Tensor | None:
        return self.inner.penalty() if isinstance(self.inner, (Penalised, Around)) else None

    def rank(self) -> int | None:
        return self.inner.rank()

    # -- on disk ------------------------------------------------------------------------------------------------------
    def resize(self, state: dict[str, Tensor]) -> None:
        self.inner.resize({a.removeprefix("inner."): t for a, t in state.items() if a.startswith("inner.")})

    def stored(self, attr: str, tensor: Tensor) -> Tensor:
        inner = attr.removeprefix("inner.")
        return tensor if inner == attr else self.inner.stored(inner, tensor)
