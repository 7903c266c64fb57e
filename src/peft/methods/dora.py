"""DoRA over any delta: W' = m ⊙ (W + ΔW) / ‖W + ΔW‖, norms per output row, m[out] trained (arXiv 2402.09353).

Not a method of its own: a config with `use_dora=True` wraps its delta. The norm is treated as a constant in backward,
as the paper's section 4.3 proposes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.method import Method, Op, Site


class DoRA(Method):
    form = "weight"
    summary = "Trains the length of each weight row apart from its direction, over any delta."
    formula = "W' = m ⊙ (W + ΔW) / ‖W + ΔW‖"

    def __init__(self, config: Any, site: Site, inner: Method) -> None:
        super().__init__(config, site)
        self.peft_type, self.prefix = inner.peft_type, inner.prefix  # type: ignore[misc]
        magnitude = f"{inner.prefix}magnitude_vector"
        self.keys = {**{f"inner.{a}": k for a, k in inner.keys.items()}, magnitude: magnitude}  # type: ignore[misc]
        self.inner = inner
        self.magnitude = magnitude
        self.dropout = inner.dropout
        self.register_parameter(magnitude, site.empty(site.geometry.out))

    def derive(self, rng: torch.Generator, site: Site) -> None:
        self.inner.derive(rng, site)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        self.inner.reset(rng, site)
        m = getattr(self, self.magnitude)
        m.copy_(self._norm(site.read().to(m.dtype)))

    def _norm(self, W: Tensor) -> Tensor:
        """‖W + ΔW‖ per row, a constant in backward."""
        return (W + self.inner.dense().to(W.dtype)).norm(dim=1).detach()

    def weight(self, W: Tensor) -> Tensor:
        moved = W + self.inner.dense().to(W.dtype)
        scale = getattr(self, self.magnitude).to(W.dtype) / moved.norm(dim=1).detach()
        return scale[:, None] * moved

    def add(self, x: Tensor, y: Tensor, op: Op) -> Tensor:
        """y + (m/n − 1) ⊙ W x + (m/n) ⊙ ΔW x, with the factored delta."""
        m = getattr(self, self.magnitude)
        W = op.read()
        scale = (m / self._norm(W.to(m.dtype))).to(y.dtype)
        dropped = self.drop(x, op)
        base = op(dropped, W.to(y.dtype))
        term = self.inner.term(dropped, op, y.dtype)
        return y + op.scale(base, scale - 1) + op.scale(term, scale)

    def rank(self) -> int | None:
        return min(self.geometry.out, self.geometry.fan_in)

    def disk_shape(self, attr: str) -> tuple[int, ...] | None:
        if attr.startswith("inner."):
            return self.inner.disk_shape(attr.removeprefix("inner."))
        return (1, -1, *(1 for _ in self.geometry.shape)) if self.geometry.shape else None
