"""The contract a base-layer kind fulfils, so that every method works on it.

A kind describes one sort of module: where its weight matrix is, how to run the layer's own geometry with another
matrix, and how to read and write the weight. All matrices are `W[out, fan_in]`, whatever the native layout:
`fan_in` is inputs x kernel size / groups for convolutions and the vocabulary for embeddings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import offload
from .light import Light, Uncalled


@dataclass(frozen=True)
class Geometry:
    """The sizes of a layer seen as `y = W x`."""

    out: int  # output channels
    fan_in: int  # columns of W; 0 where there is no weight matrix
    inputs: int  # input channels: the size of x's channel axis; of an embedding, the size of its rows
    kernel: int = 1  # taps of a convolution kernel
    groups: int = 1
    indexed: bool = False  # x holds indices (an embedding): W's columns are looked up
    shape: tuple[int, ...] = ()  # the native kernel size, () for layers without one

    @property
    def weightless(self) -> bool:
        return self.fan_in == 0

    @property
    def factored(self) -> bool:
        """Whether `pointwise(op(x, A), B)` equals `op(x, B @ A)`: not when groups share no inputs."""
        return self.groups == 1

    @property
    def pointwise(self) -> bool:
        """Whether a matrix on x's channels is a matrix on W's columns."""
        return self.kernel == 1 and self.groups == 1 and not self.indexed

    @property
    def is_matrix(self) -> bool:
        """Whether the layer is one matrix on the last axis of its input: y = x Wᵀ, no kernel of whatever size."""
        return self.pointwise and not self.shape

    @property
    def width(self) -> int:
        """The size of the vectors an input transform (`before`) acts on: channels, or the columns of a kernel's W."""
        return self.inputs if self.pointwise or self.indexed else self.fan_in

    def spread(self, channels: Tensor) -> Tensor:
        """A vector `[inputs]` as a factor for the entries of `W[out, fan_in]`, for kernels and groups."""
        per = channels.reshape(self.groups, 1, self.inputs // self.groups, 1)
        full = per.expand(self.groups, self.out // self.groups, self.inputs // self.groups, self.kernel)
        return full.reshape(self.out, self.fan_in)


@functools.lru_cache(maxsize=4096)
def plain_geometry(out: int, inputs: int) -> Geometry:
    """That of a plain matrix: one object for all layers of a size."""
    return Geometry(out=out, fan_in=inputs, inputs=inputs)


@dataclass
class Part:
    """One weight of a composite: the module that computes with it hangs at `parent.attr`."""

    parent: nn.Module
    attr: str
    stem: str  # the part's path below the composite, as upstream writes it to disk; "" is the composite's own


class Wrapper(Light):
    """What this library hangs in the place of a module of the base model."""

    base_layer: nn.Module


class Slots(Uncalled):
    """The container whose children are `<adapter>`, and `%<part>`: a container of the companions of that sort."""

    def put(self, name: str, method: nn.Module) -> None:
        self._modules[name] = method

    def __setattr__(self, name: str, value: Any) -> None:
        """Something puts a stand-in around what hangs here (FSDP's units): from now on it is what is called."""
        held = self.__dict__.get("_modules", {}).get(name)
        super().__setattr__(name, value)
        if held is not None and isinstance(value, nn.Module) and value is not held:
            held.__dict__["gathered"] = True
            self.replaced(held, value)

    def replaced(self, held: nn.Module, value: nn.Module) -> None:
        """Tell who calls what hangs here."""
        layer = self.__dict__.get("layer")
        if layer is not None:
            table = layer.methods
            table.update({n: tuple(value if m is held else m for m in ms) for n, ms in table.items()})

    def drop(self, name: str) -> None:
        del self._modules[name]


def tree(module: nn.Module, wrappers: bool = False) -> Iterator[nn.Module]:
    """The base model's modules at and below `module`, in order: past what adapters hold, so that none makes it longer.

    wrappers: yield them, too, instead of looking through them.
    """
    seen: set[int] = set()
    left = [module]
    while left:
        m = left.pop()
        if id(m) in seen:
            continue
        seen.add(id(m))
        if wrappers or not isinstance(m, Wrapper):
            yield m
        if m._modules:
            left += [c for c in reversed(m._modules.values()) if c is not None and not isinstance(c, Slots)]


class Composite(Wrapper):
    """A stand-in for a module made of several weights (attention's projections, experts), each a layer of its own."""

    def parts(self) -> dict[str, Part]:
        """Path below the composite -> where the part hangs."""
        raise NotImplementedError(f"{type(self).__name__}.parts")

    def to_disk(self, state: dict[str, Tensor], methods: dict[str, Any]) -> dict[str, Tensor]:
        """The parts' tensors (keys below the composite's stem) in upstream's layout; and back.

        methods: the adapter's method at each part, by the part's stem.
        """
        return state

    def from_disk(self, state: dict[str, Tensor], methods: dict[str, Any]) -> dict[str, Tensor]:
        return state

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class LayerKind:
    """One sort of base layer. Instances hold no state and are shared by all layers of the kind."""

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    priority: ClassVar[int] = 0  # asked in descending order: the most specific kind claims first
    linear: ClassVar[bool] = False  # what `all-linear` means
    composes: ClassVar[bool] = False  # `split` gives a stand-in
    by_type: ClassVar[bool] = False  # `claims` asks for the module's class and nothing else
    bare: ClassVar[bool] = False  # asked for `target_parameters` only
    fresh_output: ClassVar[bool] = True  # the base call's result may be added into, in place
    factored: ClassVar[bool] = True  # False where only whole matrices can be run (raw parameters)

    tolerance: ClassVar[float] = 2e-5  # forward against merged, relative to the output
    castable: ClassVar[bool] = True  # the layer can be cast to bf16
    compiles: ClassVar[bool] = True  # the plain layer compiles in one graph

    def examples(self) -> dict[str, Callable[[], tuple[Any, ...]]]:
        """`name -> maker of (layer, inputs)` or `(layer, inputs, targeting fields)`: small layers that the laws test."""
        return {}

    def claims(self, module: nn.Module) -> bool:
        raise NotImplementedError(f"{type(self).__name__}.claims")

    def split(self, module: nn.Module) -> Composite | None:
        """For modules made of several weights: a stand-in whose `parts()` are single-weight layers."""
        return None

    @property
    def splits(self) -> bool:
        """Whether `split` may give a stand-in."""
        return type(self).split is not LayerKind.split

    def geometry(self, module: nn.Module) -> Geometry:
        raise NotImplementedError(f"{type(self).__name__}.geometry")

    def installed(self, modules: Iterable[nn.Module]) -> None:
        """Called with a model's modules when some were wrapped: for those that read raw weights below them, past a wrapper."""

    def removed(self, modules: Iterable[nn.Module]) -> None:
        """The inverse, when all wrappers were taken out."""

    def merge_refusal(self, module: nn.Module) -> str:
        """Why the base's format has no way to hold a changed weight; "" where it has."""
        return ""

    def admit(self, module: nn.Module, method: Any, path: str) -> None:
        """Raise `Refusal` where this kind cannot run what a planned method does; called before anything changes."""

    def adopted(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Called when a layer was wrapped, with the model's floating dtype, for formats that do not record theirs."""

    # -- running ----------------------------------------------------------------------------------------------------
    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The base layer's own forward."""
        return module(*args, **kwargs)

    def trainable(self, module: nn.Module) -> None:
        """Make the layer ready for a backward through it, where its format has a form that is for inference only."""

    def op(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        """This layer's geometry with `matrix[k, fan_in]` as its weight, without bias."""
        raise NotImplementedError(f"{type(self).__name__}.op")

    def plain(self, module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
        """(W, b) where calling the module is `F.linear(x, W, b)` and nothing else: what fused kernels take over."""
        return None

    def pointwise(self, h: Tensor, matrix: Tensor) -> Tensor:
        """`matrix[k, c]` applied over the channel axis of an output of this layer."""
        return F.linear(h, matrix)

    def last(self, t: Tensor) -> Tensor:
        """The tensor with its channel axis last."""
        return t

    def unlast(self, t: Tensor) -> Tensor:
        return t

    # -- weights ----------------------------------------------------------------------------------------------------
    def matrix(self, native: Tensor, module: nn.Module) -> Tensor:
        """The native weight tensor as `[out, fan_in]`."""
        return native

    def native(self, matrix: Tensor, module: nn.Module) -> Tensor:
        """The inverse of `matrix`."""
        return matrix

    def absorb(self, module: nn.Module, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A composed (W, b) as this layer can hold it: layers that have no bias may move it into W."""
        return W, b

    def parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """The layer's parameters in native layout and floating point, by name."""
        with on_device(module):
            return {n: p.clone() if p.is_meta else p for n, _, p in named(module, "_parameters")}

    def buffers(self, module: nn.Module) -> dict[str, Tensor]:
        """The buffers that belong to the layer's state (BatchNorm's running statistics), by name."""
        return {n: b for n, _, b in named(module, "_buffers")}

    def read(self, module: nn.Module) -> Tensor:
        """`W[out, fan_in]`, in floating point, brought from wherever it is kept."""
        with on_device(module):
            return self.matrix(module.weight, module)  # type: ignore[arg-type]

    def bias(self, module: nn.Module) -> Tensor | None:
        with on_device(module):
            return getattr(module, "bias", None)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype new adapter parameters follow: the layer's compute dtype."""
        for p in module._parameters.values():
            if p is not None and p.is_floating_point():
                return p.dtype
        for p in module.parameters():
            if p.is_floating_point():
                return p.dtype
        return torch.get_default_dtype()

    def device(self, module: nn.Module) -> torch.device:
        """Where adapter parameters live: where the layer computes."""
        found = offload.home(module)
        if found is not None:
            return found
        for p in module._parameters.values():
            if p is not None:
                return p.device
        first = next(module.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    def swappable(self, module: nn.Module) -> bool:
        """Whether the module itself can run with other tensors in the place of its parameters; else `op` runs them."""
        return True

    def write(self, module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
        """Put new parameter values into the layer; returns the module that now computes with them."""
        with on_device(module):
            for name, value in values.items():
                owner, leaf = _owner(module, name)
                if leaf in owner._buffers:
                    owner._buffers[leaf] = value
                elif (param := owner._parameters[leaf]) is None:
                    owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
                else:
                    param.data = value.to(param.dtype)
                offload.store(owner, [leaf])
        return module

    def untie(self, module: nn.Module, names: list[str], tied: frozenset[int] | set[int]) -> bool:
        """Give the layer its own Parameter where the present one is in `tied`; returns whether it did."""
        found = False
        for name in names:
            owner, leaf = _owner(module, name)
            param = owner._parameters.get(leaf)
            if param is not None and id(param) in tied:
                owner._parameters[leaf] = nn.Parameter(param.data, requires_grad=param.requires_grad)
                found = True
        return found

    def requantize(self, original: nn.Module, merged: nn.Module) -> tuple[nn.Module, float]:
        """The merged weight in the original's quantised format, and the largest error that made; floats stay."""
        return merged, 0.0

    def keep(self, module: nn.Module, names: list[str]) -> Any:
        """What `restore` needs to bring back the very bits: references, no copies."""
        owners = [(*_owner(module, n), n) for n in names]
        tensors = [(n, o._parameters[leaf] if leaf in o._parameters else o._buffers[leaf]) for o, leaf, n in owners]
        held = [(n, t, None if t is None else t.data) for n, t in tensors]
        return held, [source for o in {id(o): o for o, *_ in owners}.values() for source in offload.sources(o)]

    def restore(self, module: nn.Module, kept: Any) -> nn.Module:
        held, sources = kept
        offload.put_back(sources)
        for name, param, data in held:
            owner, leaf = _owner(module, name)
            if param is not None:
                param.data = data
            (owner._buffers if leaf in owner._buffers else owner._parameters)[leaf] = param
        return module


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor of `module`, and its name there; through the wrappers of other adapters."""
    *path, leaf = name.split(".")
    for step in path:
        module = _bare(getattr(_bare(module), step))
    return _bare(module), leaf


def _bare(module: nn.Module) -> nn.Module:
    """What a wrapper of this library stands for."""
    while isinstance(module, Wrapper):
        module = module.base_layer
    return module


def named(
    module: nn.Module, table: str, name: str = "", held: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, str, Any]]:
    """(name in the base model, name as it hangs now, tensor) of all parameters or persistent buffers.

    The two names differ where adapters wrapped something inside `module`; their own tensors do not appear.
    """
    seen = set() if seen is None else seen
    while isinstance(module, Wrapper):
        module, held = module.base_layer, f"{held}base_layer."
    for leaf, t in getattr(module, table).items():
        if (
            t is not None
            and id(t) not in seen
            and not (table == "_buffers" and leaf in module._non_persistent_buffers_set)
        ):
            seen.add(id(t))
            yield name + leaf, held + leaf, t
    for step, child in module._modules.items():
        if child is not None:
            yield from named(child, table, f"{name}{step}.", f"{held}{step}.", seen)


def on_device(module: nn.Module) -> Any:
    """A context in which offloaded weights at and below `module` are present."""
    if not any("_hf_hook" in m.__dict__ for m in module.modules()):
        return nullcontext()
    return offload.present(module)
