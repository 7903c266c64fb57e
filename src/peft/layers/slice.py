"""The kind of a slice of another module's parameter: it is read and written through the module that owns it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..contract import managed, offload
from ..contract.geometry import Geometry, plain_geometry
from ..contract.kind import LayerKind
from ..contract.managed import present
from ..contract.method import Method
from ..contract.offload import on_device
from ..core.acting.adapted_layer import AdaptedLayer
from ..errors import Refusal
from .weight_slice import WeightSlice


class Slice(LayerKind[WeightSlice]):
    name = "slice"
    by_type = True
    summary = "one matrix inside a parameter that its module reads raw"
    priority = 10

    def claims(self, module: nn.Module) -> bool:
        return isinstance(module, WeightSlice)

    def geometry(self, module: WeightSlice) -> Geometry:
        return plain_geometry(module.out_features, module.in_features)

    def admit(self, module: WeightSlice, method: Method, path: str) -> None:
        if module.bias_name is None and method.shifts:
            raise Refusal(
                method.peft_type,
                path,
                f"it adds a bias, and {type(module.owner).__name__} has none beside {module.weight_name} to merge it into",
            )

    def op(self, module: WeightSlice, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(x, matrix.to(x.dtype))

    # -- weights: all through the owner ------------------------------------------------------------------------------
    def read(self, module: WeightSlice) -> Tensor:
        with present(module.owner):
            return module.weight

    def bias(self, module: WeightSlice) -> Tensor | None:
        with present(module.owner):
            return module.bias

    def parameters(self, module: WeightSlice) -> dict[str, Tensor]:
        W, b = self.read(module), self.bias(module)
        return {"weight": W} if b is None else {"weight": W, "bias": b}

    def dtype(self, module: WeightSlice) -> torch.dtype:
        return getattr(module.owner, module.weight_name).dtype

    def device(self, module: WeightSlice) -> torch.device:
        found = offload.home(module.owner)
        return getattr(module.owner, module.weight_name).device if found is None else found

    def swappable(self, module: WeightSlice) -> bool:
        return False  # the parameters are the owner's

    def holder(self, module: WeightSlice) -> nn.Module:
        return module.owner

    def write(self, module: WeightSlice, values: dict[str, Tensor]) -> nn.Module:
        """In place: other slices of the same parameter may be merged, too."""
        managed.settle([module.owner])
        with torch.no_grad(), on_device(module.owner):
            for name, value in values.items():
                leaf, part = module.place(name)
                param = module.owner._parameters[leaf]
                if param is None:  # a bias of zeros for the slices that add none
                    like = getattr(module.owner, module.weight_name)
                    param = _replace(module.owner, leaf, like.new_zeros(*like.shape[:-2], module.bias_size))
                _fill(module.owner, param, part, value)
                offload.store(module.owner, [leaf])
        return module

    def untie(self, module: WeightSlice, names: list[str], tied: frozenset[int] | set[int]) -> bool:
        found = False
        for name in names:
            leaf, _ = module.place(name)
            param = module.owner._parameters[leaf]
            if param is not None and id(param) in tied:
                _replace(module.owner, leaf, param.data.clone())
                found = True
        return found

    def keep(self, module: WeightSlice, names: list[str]) -> dict[str, Tensor | None]:
        """Copies of the slices: the parameter itself is written in place."""
        kept: dict[str, Tensor | None] = {}
        with present(module.owner):
            for name in names:
                leaf, part = module.place(name)
                param = module.owner._parameters[leaf]
                kept[name] = None if param is None else part(param.data).clone()
        return kept

    def restore(self, module: WeightSlice, kept: object) -> nn.Module:
        assert isinstance(kept, dict)
        managed.settle([module.owner])
        with torch.no_grad(), on_device(module.owner):
            for name, value in kept.items():
                leaf, part = module.place(name)
                param = module.owner._parameters[leaf]
                if param is None:
                    continue
                _fill(module.owner, param, part, value)
                offload.store(module.owner, [leaf])
                _put_back(module.owner, leaf, param)
        return module


def _fill(owner: nn.Module, whole: Tensor, part: Callable[[Tensor], Tensor], value: Tensor | None) -> None:
    """Write into a part of a parameter, zeros for None."""
    away = managed.in_place(owner, whole)
    target = managed.whole(whole).clone() if away else whole.data
    here = part(target)
    here.zero_() if value is None else here.copy_(value)
    if away:
        managed.fill(whole, target)


def _replace(owner: nn.Module, leaf: str, data: Tensor) -> nn.Parameter:
    """Give the owner a parameter of its own to write to, and remember the one (or None) that stood there."""
    before = owner._parameters[leaf]
    owner.__dict__.setdefault("_before_slices", {})[leaf] = before
    own = nn.Parameter(data, requires_grad=before is not None and before.requires_grad)
    owner._parameters[leaf] = own
    return own


def _put_back(owner: nn.Module, leaf: str, param: Tensor) -> None:
    """Undo `_replace` when the last slice was restored, which is when the values are the old ones again."""
    replaced = owner.__dict__.get("_before_slices", {})
    if leaf in replaced:
        original = replaced[leaf]
        if not param.any() if original is None else torch.equal(param, original):
            owner._parameters[leaf] = replaced.pop(leaf)


def native(part: nn.Module, names: Sequence[str]) -> Tensor:
    """A part's matrix with what these adapters make of it, as it lies in the owner's parameter."""
    held = part.base_layer if isinstance(part, AdaptedLayer) else part
    assert isinstance(held, WeightSlice)
    W = held.weight
    if isinstance(part, AdaptedLayer) and not part.merged_adapters and (methods := part.active_methods(names)):
        W, _ = part.compose(methods, W.dtype)
    return W.T if held.transposed else W


def acting_names(parts: Sequence[nn.Module], by: str) -> Sequence[str]:
    """Which adapters act on these parts, where code reads them instead of calling them; none where nothing does."""
    acting = next((p for p in parts if isinstance(p, AdaptedLayer) and p.acting), None)
    if acting is None:
        return ()
    mix = acting.roster.mix
    if mix.rows is None:
        return mix.active
    if len(mix.rows.distinct) > 1:
        raise Refusal(
            "adapter_names",
            acting.path,
            f"{by} reads its weight instead of calling it, and the rows of this batch have several; run them one by one",
        )
    return mix.rows.distinct


kinds = [Slice()]
