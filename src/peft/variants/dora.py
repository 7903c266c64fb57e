"""DoRA over any delta: W' = m ⊙ (W + ΔW) / ‖W + ΔW‖, norms per output row, m[out] trained (arXiv 2402.09353).

A config with `use_dora=True` puts it around the config's own delta. The norm is a constant in backward, as the paper's
section 4.3 proposes. m starts at ‖W + ΔW‖, so that the start changes nothing by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract.site import Op, Site
from ..contract.tensors import Stored
from ..core.forms.wrapped import Around
from ..kernels.merging import row_norms
from ..kernels.terms import Thin


class DoRA(Around):
    wraps = "use_dora"
    form = "weight"
    summary = "Trains the length of each weight row apart from its direction, over any delta."
    formula = "W' = m ⊙ (W + ΔW) / ‖W + ΔW‖"
    paper = "arXiv 2402.09353"
    magnitude: str  # the attribute that holds m

    def own_tensors(self) -> dict[str, Stored]:
        self.set(magnitude=f"{self.prefix}magnitude_vector_weight")
        return {
            self.magnitude: Stored(
                f"{self.prefix}magnitude_vector", shape="out", kernel="1 -1 ones", join="rows", module=True
            )
        }

    @property
    def m(self) -> Tensor:
        return self.tensor(self.magnitude)

    def start(self, rng: torch.Generator, site: Site) -> None:
        m = self.m
        m.copy_(self._moved(site.read().to(m.device, m.dtype))[1])

    def _moved(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """(W + ΔW, its row norms)."""
        V = W + self.inner.dense().to(W.dtype)
        return V, V.detach().norm(dim=1)

    def weight(self, W: Tensor) -> Tensor:
        V, norm = self._moved(W)
        return (self.m.to(W.dtype) / norm)[:, None] * V

    def _norms(self, W: Tensor, thin: Thin | None) -> Tensor:
        """Row norms of W + ΔW, a constant in backward; without forming the sum where ΔW is two thin matrices."""
        with torch.no_grad():
            if thin is not None:
                return row_norms(W, thin.A.detach(), thin.B.detach(), thin.scale)  # no_grad keeps tangents
            return self._moved(W.to(self.m.dtype))[1]

    def _thin(self, op: Op) -> Thin | None:
        term = self.inner.fused_term(op)
        return term if isinstance(term, Thin) else None

    def fused_term(self, op: Op) -> Thin | None:
        """With rows scaled by m/n."""
        thin = self._thin(op)
        return None if thin is None else thin._replace(rows=self.m / self._norms(op.read(), thin))

    def add(self, x: Tensor, y: Tensor, op: Op) -> Tensor:
        """y + (m/n − 1) ⊙ W x + (m/n) ⊙ ΔW x, with the delta as it is computed best."""
        W, x = op.read(), self.dropped(x, op)
        scale = (self.m / self._norms(W, self._thin(op))).to(y.dtype)
        y = y + op.scale(op(x, W.to(y.dtype)), scale - 1) + op.scale(self.inner.term(x, op, y.dtype), scale)
        bias = self.bias_change()
        return y if bias is None else op.shift(y, bias.to(y.dtype))

    def rank(self) -> int | None:
        return min(self.geometry.out, self.geometry.fan_in)
