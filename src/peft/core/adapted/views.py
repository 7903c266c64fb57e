"""Views by which code written for upstream reads, calls and assigns what adapters hold: `layer.lora_A["default"].weight`.

A layer shows the names that its methods state: tensors by their keys on disk (`lora_B.weight` is the `weight` of
`lora_B`), further names that upstream's layer has (`view_names`), settings (`view_attributes`). An assignment takes
effect in the next forward or raises; nothing is kept beside what the methods compute with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ...contract.method import Method
from ...errors import Refusal
from ..acting.adapted_layer import AdaptedLayer

LEAVES = ("weight", "bias")  # what upstream keeps in a module of its own


ORIGINAL = "original_module"  # upstream's name of the base layer where whole modules are trained


def leaves(method: Method, name: str) -> dict[str, str]:
    """What upstream's `name` holds of a method: leaf of the module -> attribute, or "" -> attribute for a bare tensor."""
    if name in method.table.modules:
        return {"weight": name}
    found = {}
    for attr, key in method.table.own.items():
        head, _, leaf = key.partition(".")
        if head == name and leaf in ("", *LEAVES) and _tensor(method, attr) is not None:
            found[leaf] = attr
    return found


def upstream_name(method: Method, attr: str, key: str, adapter: str) -> str:
    """The name that an attribute has in the state dict of upstream's layer: the adapter's name comes before the leaf."""
    tree, _, rest = attr.partition(".")
    if rest and not hasattr(method._modules.get(tree), "nested"):  # a copy of a whole module
        return f"{tree}.{adapter}.{rest}"
    head, _, leaf = key.rpartition(".")
    if head and leaf in LEAVES:
        return f"{head}.{adapter}.{leaf}"
    return f"{key}.{adapter}.weight" if attr in method.table.modules else f"{key}.{adapter}"


def _tensor(method: Method, attr: str) -> Tensor | None:
    return method._parameters.get(attr, method._buffers.get(attr))


def _put(method: nn.Module, attr: str, value: Any, what: str) -> None:
    """A new tensor in the place of one that is held. A Parameter stays the very object, for optimisers that know it."""
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

    def __init__(self, layer: AdaptedLayer, method: Method, name: str, held: dict[str, str]) -> None:
        self.__dict__.update(_layer=layer, _method=method, _name=name, _held=held)

    def __getattr__(self, leaf: str) -> Any:
        if leaf.startswith("_"):
            raise AttributeError(leaf)
        if leaf in self._held:
            return getattr(self._method, self._held[leaf])
        if leaf in LEAVES:
            return None
        raise AttributeError(f"{self._name} of an adapter has no {leaf!r}, only {', '.join(self._held)}.")

    def __setattr__(self, leaf: str, value: Any) -> None:
        if leaf not in self._held:
            raise AttributeError(
                f"{self._name} of this adapter holds {', '.join(self._held)}, but no {leaf!r} to assign."
            )
        _put(self._method, self._held[leaf], value, f"{self._name}.{leaf} at {self._layer.path}")

    def __call__(self, x: Tensor) -> Tensor:
        """The factor next to x runs with the layer's geometry, the other one on channels."""
        method, weight = self._method, self.weight
        chain = [a for a, k in method.table.own.items() if k.endswith(".weight")]
        if method.form != "delta" or self._held.get("weight") not in chain:
            raise TypeError(f"{self._name} of {method.peft_type} is no layer to be called.")
        op = self._layer.op
        first = chain.index(self._held["weight"]) == 0
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
        return self._method.dropout  # type: ignore[no-any-return]

    @p.setter
    def p(self, value: float) -> None:
        self._method.dropout = float(value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "p":
            raise AttributeError(f"An adapter's dropout has p, but no {name!r}.")
        object.__setattr__(self, name, value)

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, self._method.training)

    def __repr__(self) -> str:
        return f"Dropout(p={self.p})"


class AdapterView(Mapping[str, Any]):
    """`adapter name -> value` of one name over the adapters of a layer."""

    def __init__(self, layer: AdaptedLayer, name: str) -> None:
        self.__dict__.update(_layer=layer, _name=name)

    def _method(self, adapter: str) -> Method | None:
        held = (n for m in self._layer.methods.get(adapter, ()) for n in m.nested())
        return next((m for m in held if _holds(m, self._name)), None)

    def __getitem__(self, adapter: str) -> Any:
        method, name = self._method(adapter), self._name
        if method is None:
            raise KeyError(adapter)
        if held := leaves(method, name):
            return getattr(method, held[""]) if "" in held else ModuleView(self._layer, method, name, held)
        if name == method.shown.dropout:
            return DropoutView(method)
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
        if name in method._modules:
            tree: Any = method._modules[name]
            for at, _ in list(tree.named_parameters()):
                owner, _, leaf = at.rpartition(".")
                _put(tree.get_submodule(owner), leaf, value.get_parameter(at), f"{what}.{at}")
        elif name == method.shown.dropout:
            method.dropout = float(value if isinstance(value, (int, float)) else getattr(value, "p", 0.0))
        elif name == "scaling":
            rescale(method, float(value))
        elif name in method.shown.assignable:
            setattr(method, name, value)
        else:
            raise AttributeError(f"{what} says how the adapter was made; add an adapter with another config instead.")

    def __getattr__(self, adapter: str) -> Any:
        if not adapter.startswith("_") and adapter in self:
            return self[adapter]
        raise AttributeError(f"No adapter {adapter!r} here.")

    def __setattr__(self, adapter: str, value: Any) -> None:
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
    """Make a method's `scaling` this number, by its multiplier."""
    method.multiplier = 1.0
    own = getattr(method, "scaling", 0.0)
    if not own and scaling:
        raise ValueError(f"{method.peft_type}: a strength of 0 cannot be rescaled to {scaling}.")
    method.multiplier = scaling / own if own else 1.0


def _take(module: Any, into: ModuleView, held: dict[str, str], what: str) -> None:
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


def _holds(method: Method, name: str) -> bool:
    if leaves(method, name):
        return True
    shown = method.shown
    keyed = name not in shown.settings and method.table.own.get(name, name).rpartition(".")[2] != name
    if keyed and name not in method._modules:
        return False
    return (
        name in shown.settings
        or (bool(name) and name == shown.dropout)
        or (_tensor(method, name) is not None and not keyed)
        or method._modules.get(name) is not None
    )


def _shown(method: Method, name: str) -> bool:
    return name in method.table.layer_names() or name in method.shown.names or _holds(method, name)


def view(layer: AdaptedLayer, name: str) -> Any:
    """What upstream's layer has under a name that this layer's methods show; None when none of them does.

    A name with a further level below it (`token_adapter.trainable_tokens_delta`) gives the layer, which shows that one.
    The base layer's own tensors are no views, whatever copies of them (`modules_to_save`) are called on disk.
    """
    if name in layer.base_layer._parameters or name in layer.base_layer._buffers:
        return None
    for m in (inner for methods in layer.methods.values() for outer in methods for inner in outer.nested()):
        if _shown(m, name):
            below = [k for k in m.table.own.values() if k.startswith(f"{name}.") and k.rpartition(".")[2] not in LEAVES]
            return layer if below and name not in m._modules else AdapterView(layer, name)
    return AdapterView(layer, name) if name in layer.former else None


def assign(layer: AdaptedLayer, name: str, value: Any) -> None:
    """`layer.<name> = value` for a name that is a view: entry by entry, all or an error."""
    shown = view(layer, name)
    entries = dict(value.items()) if hasattr(value, "items") else None
    if entries is None or not isinstance(shown, AdapterView) or set(entries) != set(shown):
        have = list(shown) if isinstance(shown, AdapterView) else []
        raise AttributeError(
            f"{layer.path}.{name} shows what the adapters {have} hold: assign to its entries, {name}[adapter] = …"
        )
    for adapter, entry in entries.items():
        shown[adapter] = entry


def from_upstream(layer: AdaptedLayer, state: dict[str, Tensor], prefix: str) -> None:
    """Rename the entries of a state dict that carry the names of upstream's layer to those that they have here."""
    paths = {id(m): f"{prefix}adapters.{slot}" for slot, m in layer.adapters.named_modules()}
    for adapter, methods in layer.methods.items():
        for m in methods:
            for attr, key in m.table.keys.items():
                theirs, own = prefix + upstream_name(m, attr, key, adapter), f"{paths[id(m)]}.{attr}"
                if theirs in state and own not in state:
                    held = attrgetter(attr)(m)
                    value = state.pop(theirs)
                    state[own] = value.reshape(held.shape) if value.numel() == held.numel() else value
    nested = {
        f"{k.partition('.')[0]}.base_layer" for m in layer.nested_methods() for k in m.table.own.values() if "." in k
    }
    for theirs in (ORIGINAL, *nested):
        for name in [k for k in state if k.startswith(f"{prefix}{theirs}.")]:
            state[f"{prefix}base_layer.{name.removeprefix(f'{prefix}{theirs}.')}"] = state.pop(name)


@torch.no_grad()
def delta_weight(layer: AdaptedLayer, adapter: str) -> Tensor:
    """Σ ΔW of an adapter's methods that add to the weight, in the layer's own layout, without their norms (DoRA)."""

    inner = [m.nested()[-1] for m in layer.methods.get(adapter, ())]
    if not inner:
        raise KeyError(adapter)
    other = [m for m in inner if m.form != "delta"]
    if other:
        raise Refusal(
            str(other[0].peft_type), f"get_delta_weight at {layer.path}", "its effect is no sum with the weight"
        )
    total = torch.stack([m("dense") for m in inner]).sum(0)
    return layer.kind.native(total, layer.base_layer)
