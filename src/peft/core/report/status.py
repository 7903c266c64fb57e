"""What is in a model right now: per adapted layer, and for the model as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from torch import nn

from ...contract.capabilities import Companion
from ..acting.on_model import base_of, roster_of
from ..acting.roster import Roster
from ..adapted.layer import Adapted
from .counts import trainable_and_total

T = TypeVar("T")
Irregular: TypeAlias = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """One adapted layer. requires_grad: adapter -> True, False or "irregular" where its parameters differ."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The model as a whole; "irregular" where layers differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of every adapted layer, in model order. Raises ValueError for a model without adapters."""
    base = base_of(model)
    if roster_of(base) is None:
        raise ValueError("No adapter layers found in the model, please ensure that it's a PEFT model.")
    root = "model." if base is not model and hasattr(model, "get_base_model") else ""  # as seen from the tuner
    return [_layer(root + name, m) for name, m in base.named_modules() if isinstance(m, Adapted)]


def _layer(name: str, layer: Adapted) -> TunerLayerStatus:
    parameters = {
        a: [p for m in methods for n, p in m.named_parameters() if n not in m.table.frozen]
        for a, methods in layer.methods.items()
    }
    return TunerLayerStatus(
        name=name,
        module_type=_module_type(layer),
        enabled=not layer.disable_adapters,
        active_adapters=layer.active_adapters,
        merged_adapters=list(layer.merged_adapters),
        requires_grad={a: _one(p.requires_grad for p in ps) for a, ps in parameters.items() if ps},
        available_adapters=sorted(layer.methods),
        devices={a: sorted({p.device.type for p in ps}) for a, ps in parameters.items() if ps},
        quantization_backend=None if layer.kind.castable else layer.kind.name,
    )


def _module_type(layer: Adapted) -> str:
    """Upstream's name of the layer: of the first method that is no companion, `<method>.<base>`, or what it states."""
    base = type(layer.base_layer).__name__
    if layer.kind.linear and layer.kind.castable:
        base = "Linear"  # whatever class of the base is run as one
    own = [m.nested()[-1] for methods in layer.methods.values() for m in methods]  # the method, not DoRA around it
    found = sorted(own, key=lambda m: isinstance(m, Companion))
    stated = next((m.shown.layer or f"{type(m).__module__.rpartition('.')[2]}.{{}}" for m in found if m.prefix), "{}")
    return stated.format(base)


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of the whole model, with or without the PeftModel wrapper."""
    layers = get_layer_status(model)
    base = base_of(model)
    roster = roster_of(base)
    assert roster is not None
    trainable, total = trainable_and_total(model)
    merged = {n for layer in layers for n in layer.merged_adapters}
    partly = any(merged & (set(x.available_adapters) - set(x.merged_adapters)) for x in layers)
    names = sorted({n for layer in layers for n in layer.available_adapters} | set(roster.adapters))
    return TunerModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type=_tuner_type(model, roster) if hasattr(model, "get_base_model") else "None",
        peft_types={n: getattr(c.peft_type, "value", str(c.peft_type)) for n, c in roster.configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_one(x.enabled for x in layers) if layers else roster.enabled,
        active_adapters=_active(layers, roster),
        merged_adapters="irregular" if partly else sorted(merged),
        requires_grad={n: _trains(n, layers, roster) for n in names},
        available_adapters=names,
        devices={n: sorted({d for x in layers for d in x.devices.get(n, ())}) for n in names},
        quantization_backend=_one(x.quantization_backend for x in layers) if layers else None,
    )


def _tuner_type(model: nn.Module, roster: Roster) -> str:
    """Upstream's name of the tuner: that of the adapters' method, or of its tuner for several."""
    if type(model).__name__ == "PeftMixedModel" or len({c.peft_type for c in roster.configs.values()}) > 1:
        return "MixedModel"
    config = type(next(iter(roster.configs.values())))
    return f"{config.__name__.removesuffix('Config')}Model"


def _active(layers: list[TunerLayerStatus], roster: Roster) -> list[str] | Irregular:
    """What acts, as long as each layer lets act what it holds of that."""
    wanted = [(x, [n for n in roster.chosen if n in x.available_adapters]) for x in layers]
    same = all([n for n in x.active_adapters if n in x.available_adapters] == names for x, names in wanted)
    return list(roster.chosen) if same else "irregular"


def _trains(name: str, layers: list[TunerLayerStatus], roster: Roster) -> bool | Irregular:
    found = [x.requires_grad[name] for x in layers if name in x.requires_grad]
    if not found:  # it hangs at the whole model
        found = [p.requires_grad for p in roster.adapters[name].parameters()]
    return _one(found)


def _one(values: Iterable[T]) -> T | Irregular:
    """The value that all share, or "irregular"."""
    found = list(dict.fromkeys(values))
    return found[0] if len(found) == 1 else "irregular"
