"""DoRA over any delta: W' = m ⊙ (W + ΔW) / ‖W + ΔW‖, norms per output row, m[out] trained (arXiv 2402.09353).

Not a method of its own: a config with `use_dora=True` puts it around the config's own delta. The norm is a constant in
backward, as the paper's section 4.3 proposes. m starts at ‖W + ΔW‖, so that the start changes nothing by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contract.method import Method
from ..contract.site import Op, Site
from ..kernels.merging import row_norms
from ..kernels.terms import Thin


class DoRA(Method):
    wraps = "use_dora"
    form = "weight"
    summary = "Trains the length of each weight row apart from its direction, over any delta."
    formula = "W' = m ⊙ (W + ΔW) / ‖W + ΔW‖"
    paper = "arXiv 2402.09353"

    def __init__(self, config: Any, site: Site, inner: Method) -> None:
        super().__init__(config, site)
        self.inner = inner
        self.magnitude = f"{inner.prefix}magnitude_vector"
        self.register_parameter(self.magnitude, site.empty(site.geometry.out))
        self.as_modules = (self.magnitude,)
        self.peft_type, self.prefix = inner.peft_type, inner.prefix  # type: ignore[misc]
        self.repeats = inner.repeats  # type: ignore[misc]
        self.optional = tuple(f"inner.{a}" for a in inner.optional)  # type: ignore[misc]
        self.stacking, self.transposed = inner.stacking, inner.transposed  # type: ignore[misc]
        self.joins = {**inner.joins, self.magnitude: "rows"} if inner.joins else {}  # type: ignore[misc]
        self.shared_keys = {f"inner.{a}": key for a, key in inner.shared_keys.items()}  # type: ignore[misc]

    # -- the maths ----------------------------------------------------------------------------------------------------
    def _moved(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """(W + ΔW, its row norms)."""
        V = W + self.inner.dense().to(W.dtype)
        return V, V.detach().norm(dim=1)

    def weight(self, W: Tensor) -> Tensor:
        V, norm = self._moved(W)
        return (getattr(self, self.magnitude).to(W.dtype) / norm)[:, None] * V

    def _norms(self, W: Tensor, op: Op) -> Tensor:
        """Row norms of W + ΔW, a constant in backward; without forming the sum where ΔW is two thin matrices."""
        thin = self.inner.thin(op)
        with torch.no_grad():
            if thin is not None:
                return row_norms(W, thin.A, thin.B, thin.scale)
            return self._moved(W.to(getattr(self, self.magnitude).dtype))[1]

    def thin(self, op: Op) -> Thin | None:
        """With rows scaled by m/n."""
        thin = self.inner.thin(op)
        if thin is None:
            return None
        return thin._replace(rows=getattr(self, self.magnitude) / self._norms(op.read(), op))

    def add(self, x: Tensor, y: Tensor, op: Op) -> Tensor:
        """y + (m/n − 1) ⊙ W x + (m/n) ⊙ ΔW x, with the delta as it is computed best."""
        m, W, x = getattr(self, self.magnitude), op.read(), self.dropped(x, op)
        scale = (m / self._norms(W, op)).to(y.dtype)
        y = y + op.scale(op(x, W.to(y.dtype)), scale - 1) + op.scale(self.inner.term(x, op, y.dtype), scale)
        bias = self.bias_change()
        return y if bias is None else op.shift(y, bias.to(y.dtype))

    def bias_change(self) -> Tensor | None:
        return self.inner.bias_change()

    def rank(self) -> int | None:
        return min(self.geometry.out, self.geometry.fan_in)

    # -- life: the inner method's, and m ------------------------------------------------------------------------------
    @property
    def derives(self) -> bool:
        return self.inner.derives

    def derive(self, rng: torch.Generator, site: Site) -> None:
        self.inner.derive(rng, site)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        self.inner.reset(rng, site)
        m = getattr(self, self.magnitude)
        m.copy_(self._moved(site.read().to(m.device, m.dtype))[1])

    @property
    def multiplier(self) -> float:  # type: ignore[override]
        """A factor on ΔW inside the norm, as set_scale means it."""
        return self.inner.multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        if "inner" in self._modules:
            self.inner.multiplier = value

    @property
    def dropout(self) -> float:  # type: ignore[override]
        return self.inner.dropout

    def nested(self) -> tuple[Method, ...]:
        return (self, *self.inner.nested())

    def loaded(self) -> None:
        self.inner.loaded()

    def penalty(self) -> Tensor | None:
        return self.inner.penalty()

    def frozen(self) -> tuple[str, ...]:
        return tuple(f"inner.{a}" for a in self.inner.frozen())

    # -- on disk ------------------------------------------------------------------------------------------------------
    def disk_keys(self) -> dict[str, str]:
        return {**{f"inner.{a}": k for a, k in self.inner.disk_keys().items()}, self.magnitude: self.magnitude}

    def resize(self, state: dict[str, Tensor]) -> None:
        self.inner.resize({a.removeprefix("inner."): t for a, t in state.items() if a != self.magnitude})

    def stored(self, attr: str, tensor: Tensor) -> Tensor:
        return tensor if attr == self.magnitude else self.inner.stored(attr.removeprefix("inner."), tensor)

    def disk_shape(self, attr: str) -> tuple[int, ...] | None:
        if attr != self.magnitude:
            return self.inner.disk_shape(attr.removeprefix("inner."))
        return (1, -1, *(1 for _ in self.geometry.shape)) if self.geometry.shape else None
