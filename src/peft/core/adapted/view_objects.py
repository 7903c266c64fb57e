"""What upstream has in its layer for an adapter, as objects that read and write what the methods hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ...contract.method import Method
from ...contract.tensors import head_of
from ..acting.adapted_layer import AdaptedLayer
from .copied_module import module_of
from .view_names import LEAVES, TURNED, copied, holds, leaves, sums


def _put(method: nn.Module, attr: str, value: object, what: str) -> None:
    """A new tensor in the place of one that is held. A Parameter stays the very object, for optimisers that know it."""
    if attr.endswith(TURNED):
        value = value.detach().T if isinstance(value, Tensor) else value
        return _put(method, attr.removesuffix(TURNED), value, f"the transpose of {what}")
    old = method._parameters.get(attr, method._buffers.get(attr))
    assert old is not None
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} is a tensor; got {type(value).__name__}.")
    if value.shape != old.shape:
        raise ValueError(f"{what} has shape {tuple(old.shape)} here; got {tuple(value.shape)}.")
    if attr in method._buffers:
        method._buffers[attr] = value
    else:
        method._parameters[attr] = value if isinstance(value, nn.Parameter) else nn.Parameter(value)


class ModuleView:
    """The tensors of one adapter that upstream keeps in a module: `.weight`, `.bias`, and the module's forward."""

    _layer: AdaptedLayer
    _method: Method
    _name: str
    _held: dict[str, str]  # leaf -> attribute of the method
    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: AdaptedLayer, method: Method, name: str, held: dict[str, str]) -> None:
        self.__dict__.update(_layer=layer, _method=method, _name=name, _held=held)

    def __getattr__(self, leaf: str) -> Tensor | None:
        if leaf.startswith("_"):
            raise AttributeError(leaf)
        if leaf in self._held:
            found: Tensor = attrgetter(self._held[leaf])(self._method)
            return found
        if leaf in LEAVES:
            return None
        raise AttributeError(f"{self._name} of an adapter has no {leaf!r}, only {', '.join(self._held)}.")

    def __setattr__(self, leaf: str, value: object) -> None:
        if leaf not in self._held:
            raise AttributeError(
                f"{self._name} of this adapter holds {', '.join(self._held)}, but no {leaf!r} to assign."
            )
        _put(self._method, self._held[leaf], value, f"{self._name}.{leaf} at {self._layer.path}")

    def __call__(self, x: Tensor) -> Tensor:
        """The factor next to x runs with the layer's geometry, the other one on channels."""
        method, weight = self._method, self.weight
        table = method.table
        chain = [head_of(k) for k in (*table.own.values(), *table.lent.values()) if k.endswith(".weight")]
        if not sums(method) or self._name not in chain:
            raise TypeError(f"{self._name} of {method.peft_type} is no layer to be called.")
        op = self._layer.op
        first = chain.index(self._name) == 0
        y: Tensor = op(x, weight.to(x.dtype)) if first else op.pointwise(x, weight.to(x.dtype))
        return y if self.bias is None else op.shift(y, self.bias.to(y.dtype))

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((leaf, p) for leaf in self._held if isinstance(p := getattr(self, leaf), nn.Parameter))

    def parameters(self) -> Iterator[nn.Parameter]:
        return (p for _, p in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        return {leaf: getattr(self, leaf).detach() for leaf in self._held}

    def requires_grad_(self, requires_grad: bool = True) -> ModuleView:
        for p in self.parameters():
            p.requires_grad_(requires_grad)
        return self

    def to(self, *args: Any, **kwargs: Any) -> ModuleView:
        """In place, as a module moves."""
        for attr in self._held.values():
            attr = attr.removesuffix(TURNED)
            t = getattr(self._method, attr)
            moved = t.detach().to(*args, **kwargs)
            if torch._has_compatible_shallow_copy_type(t, moved):
                t.data = moved
            else:
                setattr(self._method, attr, nn.Parameter(moved, t.requires_grad) if t.is_leaf else moved)
        return self

    def __repr__(self) -> str:
        return f"{self._name}({', '.join(f'{k}={tuple(v.shape)}' for k, v in self.state_dict().items())})"


class DropoutView:
    """The dropout of one adapter's term, as the module that upstream has for it."""

    _method: Method

    def __init__(self, method: Method) -> None:
        self.__dict__["_method"] = method

    @property
    def p(self) -> float:
        return self._method.dropout

    @p.setter
    def p(self, value: float) -> None:
        self._method.dropout = float(value)

    def __setattr__(self, name: str, value: object) -> None:
        if name != "p":
            raise AttributeError(f"An adapter's dropout has p, but no {name!r}.")
        object.__setattr__(self, name, value)

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, self._method.training)

    def __repr__(self) -> str:
        return f"Dropout(p={self.p})"


class AdapterView(Mapping[str, object]):
    """`adapter name -> value` of one name over the adapters of a layer."""

    _layer: AdaptedLayer
    _name: str

    def __init__(self, layer: AdaptedLayer, name: str) -> None:
        self.__dict__.update(_layer=layer, _name=name)

    def _method(self, adapter: str) -> Method | None:
        held = (n for m in self._layer.methods.get(adapter, ()) for n in m.nested())
        return next((m for m in held if holds(m, self._name)), None)

    def __getitem__(self, adapter: str) -> object:
        method, name = self._method(adapter), self._name
        if method is None:
            raise KeyError(adapter)
        if held := leaves(method, name):
            return attrgetter(held[""])(method) if "" in held else ModuleView(self._layer, method, name, held)
        if name == method.shown.dropout:
            return DropoutView(method)
        if (tree := copied(method, name)) is not None:
            return module_of(self._layer.base_layer, tree)
        return attrgetter(method.shown.paths.get(name, name))(method)

    def __setitem__(self, adapter: str, value: Any) -> None:
        method, name = self._method(adapter), self._name
        what = f"{name}[{adapter!r}] at {self._layer.path}"
        if method is None:
            raise KeyError(f"{what}: no adapter of this layer holds it, so an assignment would have no effect.")
        if held := leaves(method, name):
            if "" in held:
                return _put(method, held[""], value, what)
            return _take(value, ModuleView(self._layer, method, name, held), held, what)
        if (tree := copied(method, name)) is not None:
            for at, _ in list(tree.named_parameters()):
                owner, _, leaf = at.rpartition(".")
                _put(tree.get_submodule(owner), leaf, value.get_parameter(at), f"{what}.{at}")
        elif name == method.shown.dropout:
            method.dropout = float(value if isinstance(value, (int, float)) else getattr(value, "p", 0.0))
        elif name == "scaling":
            rescale(method, float(value))
        elif name in method.shown.assignable:
            setattr(method, method.shown.paths.get(name, name), value)
        else:
            raise AttributeError(f"{what} says how the adapter was made; add an adapter with another config instead.")

    def __getattr__(self, adapter: str) -> object:
        if not adapter.startswith("_") and adapter in self:
            return self[adapter]
        raise AttributeError(f"No adapter {adapter!r} here.")

    def __setattr__(self, adapter: str, value: object) -> None:
        self[adapter] = value

    def __iter__(self) -> Iterator[str]:
        return (n for n in self._layer.methods if self._method(n) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, adapter: object) -> bool:
        return isinstance(adapter, str) and self._method(adapter) is not None

    def __repr__(self) -> str:
        return repr(dict(self))

    # -- of upstream's containers of modules and parameters -------------------------------------------------------------
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for adapter, value in self.items():
            if isinstance(value, nn.Parameter):
                yield adapter, value
            elif isinstance(value, (ModuleView, nn.Module)):
                yield from ((f"{adapter}.{leaf}", p) for leaf, p in value.named_parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        return (p for _, p in self.named_parameters())

    def requires_grad_(self, requires_grad: bool = True) -> AdapterView:
        for p in self.parameters():
            p.requires_grad_(requires_grad)
        return self

    def to(self, *args: Any, **kwargs: Any) -> AdapterView:
        for p in self.parameters():
            p.data = p.data.to(*args, **kwargs)
        return self


def rescale(method: Method, scaling: float) -> None:
    """Make a method's strength this number, by its multiplier."""
    method.multiplier = 1.0
    own = getattr(method, method.shown.paths.get("scaling", "scaling"), 0.0)
    if not own and scaling:
        raise ValueError(f"{method.peft_type}: a strength of 0 cannot be rescaled to {scaling}.")
    method.multiplier = scaling / own if own else 1.0


def _take(module: object, into: ModuleView, held: dict[str, str], what: str) -> None:
    """A module's tensors in the place of those of an adapter."""
    if not isinstance(module, (nn.Module, ModuleView)):
        raise TypeError(f"{what} is a module with {', '.join(held)}; got {type(module).__name__}.")
    given = {leaf: t for leaf in LEAVES if (t := getattr(module, leaf, None)) is not None}
    if set(given) != set(held):
        raise ValueError(f"{what} holds {' and '.join(held)}; the module has {' and '.join(given) or 'neither'}.")
    for leaf, t in given.items():
        if t.shape != getattr(into, leaf).shape:
            raise ValueError(f"{what}.{leaf} has shape {tuple(getattr(into, leaf).shape)} here; got {tuple(t.shape)}.")
    for leaf, t in given.items():
        setattr(into, leaf, t)
