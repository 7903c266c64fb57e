"""What the layer kinds with a coded weight share: y = x W~ᵀ + b, where W~ is decoded from codes and scales.

Codes cannot take a change of W in place, so merging gives a floating-point `nn.Linear` that computes with the merged
weight; the coded layer is kept, untouched, for unmerging. `requantize` codes the merged weight again and says what
that cost. A kind states how to decode, how to encode, and which dtype the model around it has.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..contract.geometry import Geometry, plain_geometry
from ..contract.managed import present
from .rewritten import Rewritten

C = TypeVar("C", bound=nn.Linear)  # a coded layer


class Quantised(Rewritten[C]):
    linear = True
    classes = (nn.Linear,)
    castable = False
    priority = 50

    def geometry(self, module: C) -> Geometry:
        return plain_geometry(int(module.out_features), int(module.in_features))

    def op(self, module: C, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(x, matrix.to(x.dtype))

    def decode(self, module: C) -> Tensor:
        """W~[out, fan_in] of a coded layer, in the model's dtype."""
        raise NotImplementedError(f"{type(self).__name__}.decode")

    def encode(self, original: C, merged: nn.Linear) -> nn.Module:
        """A layer in the format of `original` with the weight of `merged`."""
        raise NotImplementedError(f"{type(self).__name__}.encode")

    def model_dtype(self, module: C) -> torch.dtype:
        """The floating dtype that a coded layer takes and gives in its model: the dtype of the merged weight."""
        raise NotImplementedError(f"{type(self).__name__}.model_dtype")

    def compute_dtype(self, module: C) -> torch.dtype:
        return self.model_dtype(module)

    # -- weights: of the coded layer, or of the plain one that a merge left in its place ------------------------------
    def read(self, module: C) -> Tensor:
        with present(module):
            return self.decode(module) if self.claims(module) else super().read(module)

    def dtype(self, module: C) -> torch.dtype:
        return self.compute_dtype(module) if self.claims(module) else super().dtype(module)

    def write(self, module: C, values: dict[str, Tensor]) -> nn.Module:
        """A floating-point layer with these values."""
        dtype, device = self.model_dtype(module), self.device(module)
        values = {**self.parameters(module), **values}
        out, inputs = values["weight"].shape
        linear = nn.Linear(inputs, out, bias="bias" in values, device="meta")
        for name, value in values.items():
            linear._parameters[name] = nn.Parameter(value.detach().to(device, dtype), requires_grad=False)
        return linear.train(module.training)

    def requantize(self, original: C, merged: nn.Module) -> tuple[nn.Module, float]:
        """The merged weight coded again in the original's format, and the largest error that made in a weight."""
        assert isinstance(merged, nn.Linear)
        with torch.no_grad():
            coded = self.encode(original, merged).train(merged.training).requires_grad_(False)
            W = self.read(coded)  # type: ignore[arg-type]
            error = (W.float() - merged.weight.float()).abs().max()
        return coded, float(error)
