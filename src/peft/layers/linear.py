"""nn.Linear: y = x Wᵀ + b."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..contract.geometry import Geometry, plain_geometry
from ..contract.kind import Examples, LayerKind
from ..contract.own_forward import computed, runs_as, written_as


class Spelled(nn.Linear):
    """The forward of Falcon's layers, which is that of nn.Linear in other words."""

    def forward(self, input: Tensor) -> Tensor:
        y = input @ self.weight.T
        if self.bias is None:
            return y
        return y + self.bias


class Passed(nn.Linear):
    """One that only passes on."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


def _wide(module: nn.Module) -> bool:
    """Whether its weight holds numbers, not codes."""
    weight = module._parameters.get("weight")
    return weight is None or weight.is_floating_point() or weight.is_complex()


class Linear(LayerKind[nn.Linear]):
    name = "linear"
    classes = (nn.Linear,)
    linear = True
    summary = "nn.Linear, and its subclasses that compute what it does"

    def examples(self) -> Examples:
        return {
            "bias": lambda: (nn.Linear(16, 24), torch.randn(4, 16)),
            "sequence": lambda: (nn.Linear(16, 24, bias=False), torch.randn(4, 3, 16)),
        }

    def claims(self, module: nn.Module) -> bool:
        if type(module) is nn.Linear:
            return ("forward" not in module.__dict__ or runs_as(module, nn.Linear)) and not computed(module)
        if not isinstance(module, nn.Linear) or computed(module) or not _wide(module):
            return False
        return runs_as(module, nn.Linear) or written_as(module, nn.Linear, Spelled, Passed) is not None

    def geometry(self, module: nn.Linear) -> Geometry:
        return plain_geometry(int(module.out_features), int(module.in_features))

    def op(self, module: nn.Linear, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(x, matrix.to(x.dtype))

    def as_linear(self, module: nn.Linear) -> tuple[Tensor, Tensor | None] | None:
        if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
            return None
        held = module._parameters  # not by attribute: this runs in every call of every adapted layer
        weight = held.get("weight")
        if type(weight) is not nn.Parameter or weight.requires_grad or "forward" in module.__dict__:
            return None
        if module._backward_hooks or module._backward_pre_hooks:
            return None
        bias = held.get("bias")
        return None if bias is not None and bias.requires_grad else (weight, bias)


kinds = [Linear()]
