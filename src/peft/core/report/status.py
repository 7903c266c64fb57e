"""What is in a model right now: per adapted layer, and for the model as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from torch import nn

from ..acting.on_model import base_of, roster_of
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
    enabled: bool
    active_adapters: list[str]
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
    return [_layer(name, m) for name, m in base.named_modules() if isinstance(m, Adapted)]


def _layer(name: str, layer: Adapted) -> TunerLayerStatus:
    parameters = {a: [p for m in methods for p in m.parameters()] for a, methods in layer.methods.items()}
    prefix = next((m.prefix for methods in layer.methods.values() for m in methods if m.prefix), "").rstrip("_")
    return TunerLayerStatus(
        name=name,
        module_type=f"{prefix or 'adapted'}.{type(layer.base_layer).__name__}",
        enabled=not layer.disable_adapters,
        active_adapters=layer.active_adapters,
        merged_adapters=list(layer.merged_adapters),
        requires_grad={a: _one(p.requires_grad for p in ps) for a, ps in parameters.items() if ps},
        available_adapters=sorted(layer.methods),
        devices={a: sorted({p.device.type for p in ps}) for a, ps in parameters.items() if ps},
        quantization_backend=None if layer.kind.castable else layer.kind.name,
    )


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
        adapter_model_type=type(model.base_model).__name__ if hasattr(model, "get_base_model") else "None",
        peft_types={n: getattr(c.peft_type, "value", str(c.peft_type)) for n, c in roster.configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=roster.enabled,
        active_adapters=list(roster.chosen),
        merged_adapters="irregular" if partly else sorted(merged),
        requires_grad={n: _one(x.requires_grad[n] for x in layers if n in x.requires_grad) for n in names},
        available_adapters=names,
        devices={n: sorted({d for x in layers for d in x.devices.get(n, ())}) for n in names},
        quantization_backend=_one(x.quantization_backend for x in layers) if layers else None,
    )


def _one(values: Iterable[T]) -> T | Irregular:
    """The value that all share, or "irregular"."""
    found = list(dict.fromkeys(values))
    return found[0] if len(found) == 1 else "irregular"
