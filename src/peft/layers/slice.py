"""A slice of another module's parameter, as a layer: W = P[index][rows], y = x Wᵀ + b.

Modules that keep several matrices in one parameter (attention's fused projections, stacks of experts) read it raw, so
there is nothing to wrap. A `WeightSlice` stands for one of those matrices: it computes with the owner's parameter,
holds none of its own, and appears in no state dict. A composite hangs its slices under itself and calls them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..contract import offload
from ..contract.geometry import Geometry, plain_geometry
from ..contract.kind import LayerKind
from ..contract.offload import on_device
from ..errors import Refusal


class WeightSlice(nn.Module):
    """One matrix inside `owner.<weight_name>`, seen as `[out, in]`.

    index: position(s) on the leading axes (the expert in `[E, ..., ...]`). rows: a slice of the output channels (the
    query rows of a fused projection). transposed: the parameter keeps `[in, out]`. bias_name: a parameter of the
    owner with the same leading axes and the outputs last; its slice is the bias. bias_rows, bias_size: where that
    slice and the whole bias differ from the weight's (attention's query, key and value share one bias).

    The owner is referenced, not registered: it must stand elsewhere in the model's tree.
    """

    owner: nn.Module

    def __init__(
        self,
        owner: nn.Module,
        weight_name: str,
        bias_name: str | None = None,
        index: int | tuple[int, ...] | None = None,
        rows: slice | None = None,
        transposed: bool = False,
        bias_rows: slice | None = None,
        bias_size: int | None = None,
    ) -> None:
        super().__init__()
        object.__setattr__(self, "owner", owner)  # past nn.Module, which would register a child
        self.weight_name, self.bias_name = weight_name, bias_name
        self.index, self.rows, self.transposed = index, rows, transposed
        self.bias_rows = rows if bias_rows is None else bias_rows
        whole = getattr(owner, weight_name)
        self.bias_size = bias_size or whole.shape[-1 if transposed else -2]
        self.out_features, self.in_features = self.of_weight(whole).shape
        self.training = owner.training

    def of_weight(self, parameter: Tensor) -> Tensor:
        """This slice of the owner's weight, `[out, in]`: a view."""
        t = parameter if self.index is None else parameter[self.index]
        t = t.T if self.transposed else t
        return t if self.rows is None else t[self.rows]

    def of_bias(self, parameter: Tensor) -> Tensor:
        t = parameter if self.index is None else parameter[self.index]
        return t if self.bias_rows is None else t[self.bias_rows]

    @property
    def weight(self) -> Tensor:
        return self.of_weight(getattr(self.owner, self.weight_name))

    @property
    def bias(self) -> Tensor | None:
        whole = None if self.bias_name is None else getattr(self.owner, self.bias_name)
        return None if whole is None else self.of_bias(whole)

    def place(self, name: str) -> tuple[str, Any]:
        """(the owner's parameter, the function that takes this slice of it) for "weight" and "bias"."""
        if name == "weight":
            return self.weight_name, self.of_weight
        if self.bias_name is None:
            raise ValueError(f"{type(self.owner).__name__}.{self.weight_name} has no bias that could be changed.")
        return self.bias_name, self.of_bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        where = "".join(f"[{i}]" for i in (self.index, self.rows) if i is not None)
        return f"{type(self.owner).__name__}.{self.weight_name}{where}, {self.in_features} -> {self.out_features}"


class Slice(LayerKind):
    name = "slice"
    by_type = True
    summary = "one matrix inside a parameter that its module reads raw"
    priority = 10

    def claims(self, module: nn.Module) -> bool:
        return isinstance(module, WeightSlice)

    def geometry(self, module: nn.Module) -> Geometry:
        assert isinstance(module, WeightSlice)
        return plain_geometry(module.out_features, module.in_features)

    def admit(self, module: nn.Module, method: Any, path: str) -> None:
        assert isinstance(module, WeightSlice)
        if module.bias_name is None and method.shifts:
            raise Refusal(
                method.peft_type,
                path,
                f"it adds a bias, and {type(module.owner).__name__} has none beside {module.weight_name} to merge it into",
            )

    def op(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(x, matrix.to(x.dtype))

    # -- weights: all through the owner ------------------------------------------------------------------------------
    def read(self, module: nn.Module) -> Tensor:
        assert isinstance(module, WeightSlice)
        with on_device(module.owner):
            return module.weight

    def bias(self, module: nn.Module) -> Tensor | None:
        assert isinstance(module, WeightSlice)
        with on_device(module.owner):
            return module.bias

    def parameters(self, module: nn.Module) -> dict[str, Tensor]:
        W, b = self.read(module), self.bias(module)
        return {"weight": W} if b is None else {"weight": W, "bias": b}

    def dtype(self, module: nn.Module) -> torch.dtype:
        assert isinstance(module, WeightSlice)
        return getattr(module.owner, module.weight_name).dtype

    def device(self, module: nn.Module) -> torch.device:
        assert isinstance(module, WeightSlice)
        found = offload.home(module.owner)
        return getattr(module.owner, module.weight_name).device if found is None else found

    def swappable(self, module: nn.Module) -> bool:
        return False  # the parameters are the owner's

    def write(self, module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
        """In place: other slices of the same parameter may be merged, too."""
        assert isinstance(module, WeightSlice)
        with torch.no_grad(), on_device(module.owner):
            for name, value in values.items():
                leaf, part = module.place(name)
                if module.owner._parameters[leaf] is None:  # a bias of zeros for the slices that add none
                    like = getattr(module.owner, module.weight_name)
                    _replace(module.owner, leaf, like.new_zeros(*like.shape[:-2], module.bias_size))
                part(module.owner._parameters[leaf].data).copy_(value)  # type: ignore[union-attr]
                offload.store(module.owner, [leaf])
        return module

    def untie(self, module: nn.Module, names: list[str], tied: frozenset[int] | set[int]) -> bool:
        assert isinstance(module, WeightSlice)
        found = False
        for name in names:
            leaf, _ = module.place(name)
            param = module.owner._parameters[leaf]
            if param is not None and id(param) in tied:
                _replace(module.owner, leaf, param.data.clone())
                found = True
        return found

    def keep(self, module: nn.Module, names: list[str]) -> Any:
        """Copies of the slices: the parameter itself is written in place."""
        assert isinstance(module, WeightSlice)
        kept = {}
        with on_device(module.owner):
            for name in names:
                leaf, part = module.place(name)
                param = module.owner._parameters[leaf]
                kept[name] = None if param is None else part(param.data).clone()
        return kept

    def restore(self, module: nn.Module, kept: Any) -> nn.Module:
        assert isinstance(module, WeightSlice)
        with torch.no_grad(), on_device(module.owner):
            for name, value in kept.items():
                leaf, part = module.place(name)
                param = module.owner._parameters[leaf]
                if param is None:
                    continue
                here = part(param.data)
                here.zero_() if value is None else here.copy_(value)
                offload.store(module.owner, [leaf])
                _put_back(module.owner, leaf, param)
        return module


def _replace(owner: nn.Module, leaf: str, data: Tensor) -> None:
    """Give the owner a parameter of its own to write to, and remember the one (or None) that stood there."""
    before = owner._parameters[leaf]
    owner.__dict__.setdefault("_before_slices", {})[leaf] = before
    owner._parameters[leaf] = nn.Parameter(data, requires_grad=before is not None and before.requires_grad)


def _put_back(owner: nn.Module, leaf: str, param: Tensor) -> None:
    """Undo `_replace` when the last slice was restored, which is when the values are the old ones again."""
    replaced = owner.__dict__.get("_before_slices", {})
    if leaf in replaced:
        original = replaced[leaf]
        if not param.any() if original is None else torch.equal(param, original):
            owner._parameters[leaf] = replaced.pop(leaf)


kinds = [Slice()]
