"""Where a model keeps its adapters: found from anything that wraps it, bound to checkpointing that is switched on later,
and forgotten with the last of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from ...contract.method import Method
from ...contract.tree import tree
from .adapted_layer import AdaptedLayer, has_adapted_layers
from .roster import Roster
from .watch import unwatch

M = TypeVar("M", bound=Method)

_ENABLE = "_set_gradient_checkpointing"  # transformers' method that switches checkpointing on


def roster_of(model: nn.Module) -> Roster | None:
    """The adapters of a model (the base model, or anything that wraps it)."""
    roster = model.__dict__.get("_peft_roster")
    if roster is not None and roster.placed and not has_adapted_layers(model):
        forget_adapters(model)  # a library took the wrappers out by itself: the base layers stand bare
        roster = None
    if roster is None:
        held = (
            (m.roster if isinstance(m, AdaptedLayer) else m.__dict__.get("_peft_roster"))
            for m in tree(model, wrappers=True)
        )
        roster = next((h for h in held if h is not None), None)
    return roster


def methods_of(model: nn.Module, adapter_name: str, cls: type[M]) -> tuple[Roster, dict[str, M]]:
    """The roster of a model that holds this adapter, and the adapter's methods of one class by their disk paths."""
    roster = roster_of(model)
    if roster is None:
        raise ValueError(f"This {type(model).__name__} has no adapters: put one in first, with get_peft_model.")
    roster.known([adapter_name])
    return roster, {path: m for path, m in roster.adapters[adapter_name].methods if isinstance(m, cls)}


def originals(model: nn.Module) -> dict[Method, Callable[[], dict[str, Tensor]]]:
    """For every method in a model: its module's own parameters, as the base has them."""
    return {
        m: functools.partial(_parameters, layer)
        for layer in tree(model, wrappers=True)
        if isinstance(layer, AdaptedLayer)
        for methods in layer.methods.values()
        for m in methods
    }


def _parameters(layer: AdaptedLayer) -> dict[str, Tensor]:
    return layer.kind.parameters(layer.base_layer)


def rebind_later(model: nn.Module, roster: Roster) -> None:
    """Checkpointing that is switched on later must remember the adapters, too."""
    if getattr(model, _ENABLE, None) is None or _ENABLE in model.__dict__:
        return
    model.__dict__[_ENABLE] = _Rebind(model)


class _Rebind:
    """Picklable stand-in for `model._set_gradient_checkpointing` that binds the blocks it switched on."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: object, **kwargs: object) -> object:
        result: object = getattr(type(self.model), _ENABLE)(self.model, *args, **kwargs)
        roster = roster_of(self.model)
        if roster is not None:
            roster.bind_checkpointing(tree(self.model))
        return result


def forget_adapters(model: nn.Module) -> None:
    """Forget the adapters where the model keeps them."""
    for module in (model, getattr(model, "model", None)):
        if isinstance(module, nn.Module):
            module.__dict__.pop(_ENABLE, None)
    unwatch(model)
    model.__dict__.pop("_peft_roster", None)
    model.__dict__.pop("peft_config", None)


def base_of(model: nn.Module) -> nn.Module:
    """The base model under this library's wrapper, or the model itself."""
    get = getattr(model, "get_base_model", None)
    return model if get is None else get()
