"""The contract a base-layer kind fulfils, so that every method works on it.

A kind describes one sort of module, `LayerKind[nn.Linear]` says of which class: where its weight matrix is, how to run
the layer's own geometry with another matrix, and how to read and write the weight. All matrices are `W[out, fan_in]`,
whatever the native layout: `fan_in` is inputs x kernel size / groups for convolutions and the vocabulary for embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Generic, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import managed, offload
from .geometry import Geometry
from .managed import present
from .method import Method
from .offload import on_device
from .tree import Composite, base_layer_of, named

M = TypeVar("M", bound=nn.Module)  # the class of the modules that a kind describes

Inputs: TypeAlias = Tensor | tuple[Tensor, ...]
Example: TypeAlias = tuple[nn.Module, Inputs] | tuple[nn.Module, Inputs, dict[str, list[str]]]
Examples: TypeAlias = dict[str, Callable[[], Example]]  # by name


class Kept(NamedTuple):
    """A layer's tensors by name, each with what it held (None where there was none), and what its hooks load from."""

    parameters: dict[str, tuple[nn.Parameter, Tensor] | None]
    buffers: dict[str, tuple[Tensor, Tensor] | None]
    sources: list[tuple[offload.Hook, offload.Source]]


class LayerKind(Generic[M]):
    """One sort of base layer. Instances hold no state and are shared by all layers of the kind."""

    name: str
    summary: str = ""
    priority: ClassVar[int] = 0  # asked in descending order: the most specific kind claims first
    linear: ClassVar[bool] = False  # what `all-linear` means
    by_type: ClassVar[bool] = False  # `claims` asks for the module's class and nothing else
    classes: tuple[type[nn.Module], ...] = ()  # it claims instances of these only, where there are some
    for_parameters: ClassVar[bool] = False  # asked for `target_parameters` only
    factored: ClassVar[bool] = True  # False where only whole matrices can be run (raw parameters)
    own_forward: ClassVar[bool] = False  # such a matrix is run by the module's own forward, not by `op`

    tolerance: ClassVar[float] = 2e-5  # forward against merged, relative to the output
    castable: ClassVar[bool] = True  # the layer can be cast to bf16
    replaces: ClassVar[bool] = False  # writing makes another layer instead of changing this one
    compiles: ClassVar[bool] = True  # the plain layer compiles in one graph

    def examples(self) -> Examples:
        """`name -> maker of (layer, inputs)` or `(layer, inputs, targeting fields)`: small layers that the laws test."""
        return {}

    def claims(self, module: nn.Module) -> bool:
        raise NotImplementedError(f"{type(self).__name__}.claims")

    def stand_in(self, module: M) -> Composite | None:
        """For modules made of several weights: a stand-in whose `parts()` are single-weight layers."""
        return None

    @property
    def stands_in(self) -> bool:
        """Whether `stand_in` may give a stand-in."""
        return type(self).stand_in is not LayerKind.stand_in

    def geometry(self, module: M) -> Geometry:
        raise NotImplementedError(f"{type(self).__name__}.geometry")

    def installed(self, modules: Iterable[nn.Module]) -> None:
        """Called with a model's modules when some were wrapped: for those that read raw weights below them, past a wrapper."""

    def removed(self, modules: Iterable[nn.Module]) -> None:
        """The inverse, when all wrappers were taken out."""

    def why_opaque(self, module: M) -> str:
        """Why a module that looks like a layer with a weight is none that can be adapted; "" for all others."""
        return ""

    def merge_refusal(self, module: M) -> str:
        """Why the base's format has no way to hold a changed weight; "" where it has."""
        weight = module._parameters.get("weight")
        if weight is None or not weight.is_floating_point() or weight.dtype.itemsize > 1:
            return ""
        return f"its weight is stored as {weight.dtype}, which rounds small changes away: cast the layer first"

    def admit(self, module: M, method: Method, path: str) -> None:
        """Raise `Refusal` where this kind cannot run what a planned method does; called before anything changes."""

    def adopted(self, module: M, dtype: torch.dtype) -> None:
        """Called when a layer was wrapped, with the model's floating dtype, for formats that do not record theirs."""

    # -- running ----------------------------------------------------------------------------------------------------
    def run(self, module: M, *args: Any, **kwargs: Any) -> Any:
        """The base layer's own forward."""
        return module(*args, **kwargs)

    def trainable(self, module: M) -> None:
        """Make the layer ready for a backward through it, where its format has a form that is for inference only."""

    def op(self, module: M, x: Tensor, matrix: Tensor) -> Tensor:
        """This layer's geometry with `matrix[k, fan_in]` as its weight, without bias."""
        raise NotImplementedError(f"{type(self).__name__}.op")

    def as_linear(self, module: M) -> tuple[Tensor, Tensor | None] | None:
        """(W, b) where calling the module is `F.linear(x, W, b)` and nothing else: what fused kernels take over."""
        return None

    def pointwise(self, h: Tensor, matrix: Tensor) -> Tensor:
        """`matrix[k, c]` applied over the channel axis of an output of this layer."""
        return F.linear(h, matrix)

    def channels_last(self, t: Tensor) -> Tensor:
        """The tensor with its channel axis last."""
        return t

    def channels_back(self, t: Tensor) -> Tensor:
        return t

    # -- weights ----------------------------------------------------------------------------------------------------
    def matrix(self, native: Tensor, module: M) -> Tensor:
        """The native weight tensor as `[out, fan_in]`."""
        return native

    def native(self, matrix: Tensor, module: M) -> Tensor:
        """The inverse of `matrix`."""
        return matrix

    def absorb(self, module: M, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A composed (W, b) as this layer can hold it: layers that have no bias may move it into W."""
        return W, b

    def parameters(self, module: M) -> dict[str, Tensor]:
        """The layer's parameters in native layout and floating point, by name."""
        with present(module):
            return {n: p.clone() if p.is_meta else wide_enough(p) for n, _, p in named(module, "_parameters")}

    def buffers(self, module: M) -> dict[str, Tensor]:
        """The buffers that belong to the layer's state (BatchNorm's running statistics), by name."""
        return {n: b for n, _, b in named(module, "_buffers")}

    def read(self, module: M) -> Tensor:
        """`W[out, fan_in]`, in floating point, brought from wherever it is kept."""
        with present(module):
            return self.matrix(wide_enough(module.weight), module)  # type: ignore[arg-type]

    def bias(self, module: M) -> Tensor | None:
        with present(module):
            return getattr(module, "bias", None)

    def dtype(self, module: M) -> torch.dtype:
        """The dtype new adapter parameters follow: the layer's compute dtype."""
        for p in module._parameters.values():
            if p is not None and p.is_floating_point():
                return p.dtype
        for p in module.parameters():
            if p.is_floating_point():
                return p.dtype
        for p in module.parameters():
            if p.is_complex():
                return p.dtype
        return torch.get_default_dtype()

    def device(self, module: M) -> torch.device:
        """Where adapter parameters live: where the layer computes."""
        found = offload.home(module)
        if found is not None:
            return found
        for p in module._parameters.values():
            if p is not None:
                return p.device
        first = next(module.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    def swappable(self, module: M) -> bool:
        """Whether the module itself can run with other tensors in the place of its parameters; else `op` runs them."""
        return True

    def holder(self, module: M) -> nn.Module:
        """The module that a write changes the parameters of."""
        return module

    def write(self, module: M, values: dict[str, Tensor]) -> nn.Module:
        """Put new parameter values into the layer; returns the module that now computes with them."""
        managed.settle([module])
        with on_device(module):
            for name, value in values.items():
                owner, leaf = _owner(module, name)
                if leaf in owner._buffers:
                    owner._buffers[leaf] = value
                elif (param := owner._parameters[leaf]) is None:
                    like = next((p for p in owner._parameters.values() if p is not None), value)
                    owner._parameters[leaf] = nn.Parameter(value.to(like.dtype), requires_grad=False)
                elif managed.in_place(owner, param):
                    managed.fill(param, value)
                else:
                    param.data = value.to(param.dtype)
                offload.store(owner, [leaf])
        return module

    def untie(self, module: M, names: list[str], tied: frozenset[int] | set[int]) -> bool:
        """Give the layer its own Parameter where the present one is in `tied`; returns whether it did."""
        found = False
        for name in names:
            owner, leaf = _owner(module, name)
            param = owner._parameters.get(leaf)
            if param is not None and id(param) in tied:
                owner._parameters[leaf] = nn.Parameter(param.data, requires_grad=param.requires_grad)
                found = True
        return found

    def requantize(self, original: M, merged: nn.Module) -> tuple[nn.Module, float]:
        """The merged weight in the original's quantised format, and the largest error that made; floats stay."""
        return merged, 0.0

    def keep(self, module: M, names: list[str]) -> object:
        """What `restore` needs to bring back the very bits: references, and copies of what is written in place."""
        managed.settle([module])
        kept, owners = Kept({}, {}, []), []
        for name in names:
            owner, leaf = _owner(module, name)
            owners.append(owner)
            if leaf in owner._parameters:
                param = owner._parameters[leaf]
                if param is not None and managed.in_place(owner, param):
                    kept.parameters[name] = (param, managed.copy_of(param))
                else:
                    kept.parameters[name] = None if param is None else (param, param.data)
            else:
                buffer = owner._buffers[leaf]
                kept.buffers[name] = None if buffer is None else (buffer, buffer.data)
        for owner in {id(o): o for o in owners}.values():
            kept.sources.extend(offload.sources(owner))
        return kept

    def restore(self, module: M, kept: object) -> nn.Module:
        assert isinstance(kept, Kept)
        managed.settle([module])
        offload.put_back(kept.sources)
        for name, held in kept.parameters.items():
            owner, leaf = _owner(module, name)
            now = owner._parameters.get(leaf)
            if held is not None and now is not None and managed.in_place(owner, now):
                managed.fill_back(now, held[1])
                continue
            if held is not None:
                held[0].data = held[1]
            owner._parameters[leaf] = None if held is None else held[0]
        for name, one in kept.buffers.items():
            owner, leaf = _owner(module, name)
            if one is not None:
                one[0].data = one[1]
            owner._buffers[leaf] = None if one is None else one[0]
        return module


def wide_enough(t: Tensor) -> Tensor:
    """The tensor, of an 8-bit format in fp32: torch stores such numbers, but does not compute with them."""
    return t.float() if t.dtype.itemsize == 1 and t.is_floating_point() else t


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor of `module`, and its name there; through the wrappers of other adapters."""
    *path, leaf = name.split(".")
    for step in path:
        module = base_layer_of(getattr(base_layer_of(module), step))
    return base_layer_of(module), leaf
