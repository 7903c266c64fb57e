"""What the layer kinds with a coded weight share: y = x W~ᵀ + b, where W~ is decoded from codes and scales.

Codes cannot take a change of W in place, so merging gives a floating-point `nn.Linear` that computes with the merged
weight; the coded layer is kept, untouched, for unmerging. `requantize` codes the merged weight again and says what
that cost. A kind states how to decode, how to encode, and which dtype the model around it has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..contract.geometry import Geometry, plain_geometry
from ..contract.kind import LayerKind
from ..contract.offload import on_device


class Quantised(LayerKind):
    linear = True
    castable = False
    priority = 50

    def geometry(self, module: nn.Module) -> Geometry:
        out, inputs = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
        return plain_geometry(out, inputs)

    def op(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(x, matrix.to(x.dtype))

    def decode(self, module: nn.Module) -> Tensor:
        """W~[out, fan_in] of a coded layer, in the model's dtype."""
        raise NotImplementedError(f"{type(self).__name__}.decode")

    def encode(self, original: nn.Module, merged: nn.Linear) -> nn.Module:
        """A layer in the format of `original` with the weight of `merged`."""
        raise NotImplementedError(f"{type(self).__name__}.encode")

    def model_dtype(self, module: nn.Module) -> torch.dtype:
        """The floating dtype that a coded layer takes and gives in its model: the dtype of the merged weight."""
        raise NotImplementedError(f"{type(self).__name__}.model_dtype")

    def compute_dtype(self, module: nn.Module) -> torch.dtype:
        return self.model_dtype(module)

    # -- weights: of the coded layer, or of the plain one that a merge left in its place ------------------------------
    def read(self, module: nn.Module) -> Tensor:
        with on_device(module):
            return self.decode(module) if self.claims(module) else super().read(module)

    def dtype(self, module: nn.Module) -> torch.dtype:
        return self.compute_dtype(module) if self.claims(module) else super().dtype(module)

    def parameters(self, module: nn.Module) -> dict[str, Tensor]:
        bias = self.bias(module)
        W = self.read(module)
        return {"weight": W} if bias is None else {"weight": W, "bias": bias}

    def buffers(self, module: nn.Module) -> dict[str, Tensor]:
        return {}  # codes and scales: the weight, not a state of its own

    def swappable(self, module: nn.Module) -> bool:
        return False  # its parameters are codes

    def keep(self, module: nn.Module, names: list[str]) -> Any:
        """Nothing: writing makes another layer and leaves this one as it is."""

    def restore(self, module: nn.Module, kept: Any) -> nn.Module:
        return module

    def untie(self, module: nn.Module, names: list[str], tied: frozenset[int] | set[int]) -> bool:
        return False

    def write(self, module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
        """A floating-point layer with these values."""
        dtype, device = self.model_dtype(module), self.device(module)
        values = {**self.parameters(module), **values}
        out, inputs = values["weight"].shape
        linear = nn.Linear(inputs, out, bias="bias" in values, device="meta")
        for name, value in values.items():
            linear._parameters[name] = nn.Parameter(value.detach().to(device, dtype), requires_grad=False)
        return linear.train(module.training)

    def requantize(self, original: nn.Module, merged: nn.Module) -> tuple[nn.Module, float]:
        """The merged weight coded again in the original's format, and the largest error that made in a weight."""
        assert isinstance(merged, nn.Linear)
        with torch.no_grad():
            coded = self.encode(original, merged).train(merged.training).requires_grad_(False)
            error = (self.read(coded).float() - merged.weight.float()).abs().max()
        return coded, float(error)
