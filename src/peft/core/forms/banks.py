"""ΔW = s·diag(e) B diag(d) A around frozen matrices A[r, fan_in] and B[out, r]: only the vectors d and e train."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...contract.method import Method
from ...contract.site import Op
from ...kernels.terms import Banks


class VectorsAroundBanks(Method):
    """A subclass says what stands in the formula; where the frozen matrices come from is its own affair."""

    own_r: int

    def banks(self) -> Banks:
        raise NotImplementedError(f"{type(self).__name__}.banks")

    def delta(self) -> tuple[Tensor, Tensor]:
        A, B, d, e, scale = self.banks()
        return d[:, None] * A, scale * e[:, None] * B

    def term(self, x: Tensor, op: Op, dtype: torch.dtype) -> Tensor:
        if not op.geometry.factored:
            return super().term(x, op, dtype)
        A, B, d, e, scale = self.banks()  # scaling activations spares the gradients of d·A and e·B, which nobody needs
        h = op.scale(op(x, A.to(dtype)), d.to(dtype))
        return op.scale(op.pointwise(h, B.to(dtype)), (scale * e).to(dtype))

    def fused_term(self, op: Op) -> Banks:
        return self.banks()

    def rank(self) -> int:
        return min(self.own_r, self.geometry.out, self.geometry.fan_in)


def uniform_bank(rows: int, columns: int, dtype: torch.dtype, rng: torch.Generator) -> nn.Parameter:
    """A frozen matrix, uniform in ±√(6/columns): the same numbers whatever the dtype."""
    bound = math.sqrt(6 / columns)
    values = torch.empty(rows, columns, dtype=torch.float32).uniform_(-bound, bound, generator=rng)
    return nn.Parameter(values.to(dtype), requires_grad=False)
