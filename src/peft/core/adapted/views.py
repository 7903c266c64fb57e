"""Views by which code written for upstream reads, calls and assigns what adapters hold: `layer.lora_A["default"].weight`.

A layer shows the names that its methods state: tensors by their keys on disk (`lora_B.weight` is the `weight` of
`lora_B`), further names that upstream's layer has (`Shown.empty`), settings (`Shown.settings`). An assignment takes
effect in the next forward or raises; nothing is kept beside what the methods compute with.
"""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor

from ...errors import Refusal
from ..acting.adapted_layer import AdaptedLayer
from .view_names import LEAVES, copied, shows, sums, upstream_name
from .view_objects import AdapterView

ORIGINAL = "original_module"  # upstream's name of the base layer where whole modules are trained


def view(layer: AdaptedLayer, name: str) -> AdapterView | AdaptedLayer | None:
    """What upstream's layer has under a name that this layer's methods show; None when none of them does.

    A name with a further level below it (`token_adapter.trainable_tokens_delta`) gives the layer, which shows that one.
    The base layer's own tensors are no views, whatever copies of them (`modules_to_save`) are called on disk.
    """
    if name in layer.base_layer._parameters or name in layer.base_layer._buffers:
        return None
    for m in (inner for methods in layer.methods.values() for outer in methods for inner in outer.nested()):
        if shows(m, name):
            below = [k for k in m.table.own.values() if k.startswith(f"{name}.") and k.rpartition(".")[2] not in LEAVES]
            return layer if below and copied(m, name) is None else AdapterView(layer, name)
    return AdapterView(layer, name) if name in layer.former else None


def assign(layer: AdaptedLayer, name: str, value: object) -> None:
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
    other = [m for m in inner if not sums(m)]
    if other:
        raise Refusal(
            str(other[0].peft_type), f"get_delta_weight at {layer.path}", "its effect is no sum with the weight"
        )
    total = torch.stack([m("dense") for m in inner]).sum(0)
    return layer.kind.native(total, layer.base_layer)
