"""Layers whose weight is computed from other tensors: torch's parametrizations (weight norm, spectral norm, any of one's
own), the older hooks of the same names, and pruning.

The layer runs as it is, and adapters stand beside it, as beside any layer of its class: y = x W(θ)ᵀ + x ΔWᵀ + b. W(θ)
cannot take a change, so a merge puts a plain layer with W(θ) + ΔW in its place.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from ..contract.kind import Examples, LayerKind
from ..contract.managed import present
from ..contract.own_forward import computed, runs_as, weight_hooks
from .conv import Conv, ConvTranspose
from .linear import Linear
from .rewritten import Rewritten

M = TypeVar("M", bound=nn.Module)


class Computed(Rewritten[M]):
    by_type = False
    castable = False  # casting a spectral norm's vectors moves its weight
    priority: ClassVar[int] = -1  # asked after the layer itself

    def read(self, module: M) -> Tensor:
        if not computed(module):  # what a merge left in its place
            return super().read(module)
        with present(module):
            return self.matrix(weight_of(module), module)

    def dtype(self, module: M) -> torch.dtype:
        return next(p.dtype for p in module.parameters() if p.is_floating_point())

    def write(self, module: M, values: dict[str, Tensor]) -> nn.Module:
        values = {**self.parameters(module), **values}
        return plain(module, {n: v.detach().to(self.dtype(module)) for n, v in values.items()})

    def as_linear(self, module: M) -> tuple[Tensor, Tensor | None] | None:
        return None if computed(module) else super().as_linear(module)


class ComputedLinear(Computed[nn.Linear], Linear):
    name = "computed_linear"
    summary = "nn.Linear with weight norm, spectral norm, pruning or another parametrization"

    def examples(self) -> Examples:
        return {}  # torch pickles no parametrized module, which the laws ask for: tests/layers/test_computed.py

    def claims(self, module: nn.Module) -> bool:
        return (
            isinstance(module, nn.Linear) and computed(module) and runs_as(module, nn.Linear) and _weight_only(module)
        )


class ComputedConv(Computed[_ConvNd], Conv):
    def __init__(self, axes: int) -> None:
        super().__init__(axes)
        self.name, self.summary = f"computed_{self.name}", f"nn.Conv{axes}d with a parametrized weight"

    def examples(self) -> Examples:
        return {}

    def claims(self, module: nn.Module) -> bool:
        mine = isinstance(module, self.module_class) and computed(module) and _weight_only(module)
        return mine and runs_as(module, self.module_class, "_conv_forward")


class ComputedConvTranspose(Computed[_ConvNd], ConvTranspose):
    def __init__(self, axes: int) -> None:
        super().__init__(axes)
        self.name, self.summary = f"computed_{self.name}", f"nn.ConvTranspose{axes}d with a parametrized weight"

    def examples(self) -> Examples:
        return {}

    def claims(self, module: nn.Module) -> bool:
        mine = isinstance(module, self.module_class) and computed(module) and _weight_only(module)
        return mine and runs_as(module, self.module_class)


def _weight_only(module: nn.Module) -> bool:
    """Whether the weight and nothing else is computed."""
    if "parametrizations" in module._modules:
        return parametrize.is_parametrized(module, "weight") and len(module.parametrizations) == 1  # type: ignore[arg-type]
    return all(
        (getattr(h, "name", None) or getattr(h, "_tensor_name", "")) == "weight" for h in weight_hooks(module).values()
    )


@torch.no_grad()
def weight_of(module: nn.Module) -> Tensor:
    """The weight as the next evaluation computes it; the tensors that it is computed from stay as they are."""
    if "parametrizations" in module._modules:
        steps: Any = module.parametrizations["weight"]  # type: ignore[index,operator]
        training = [m for m in steps.modules() if m.training]
        try:
            for m in training:
                m.training = False  # a spectral norm turns its vectors whenever it is read in training
            return module.weight.detach()  # type: ignore[union-attr,operator,return-value]
        finally:
            for m in training:
                m.training = True
    W = module.weight
    for hook in weight_hooks(module).values():
        if hasattr(hook, "apply_mask"):
            W = hook.apply_mask(module)
        elif hasattr(hook, "n_power_iterations"):
            W = hook.compute_weight(module, do_power_iteration=False)
        else:
            W = hook.compute_weight(module)
    return W.detach()  # type: ignore[union-attr,operator,return-value]


def plain(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """A layer of the class beneath, with these values as its parameters and all else the module's."""
    cls = type(module).__bases__[0] if "parametrizations" in module._modules else type(module)
    made: nn.Module = object.__new__(cls)
    hooks = weight_hooks(module)
    fields = {k: v for k, v in module.__dict__.items() if k not in values}
    fields["_modules"] = {k: m for k, m in module._modules.items() if k != "parametrizations"}
    fields["_buffers"] = {k: b for k, b in module._buffers.items() if not k.startswith("weight_")}
    fields["_forward_pre_hooks"] = type(module._forward_pre_hooks)(
        (i, h) for i, h in module._forward_pre_hooks.items() if i not in hooks
    )
    fields["_parameters"] = {n: nn.Parameter(v, requires_grad=False) for n, v in values.items()}
    fields["_parameters"].setdefault("bias", None)
    made.__dict__.update(fields)
    return made


kinds: list[LayerKind] = [
    ComputedLinear(),
    *(ComputedConv(n) for n in (1, 2, 3)),
    *(ComputedConvTranspose(n) for n in (1, 2, 3)),
]
