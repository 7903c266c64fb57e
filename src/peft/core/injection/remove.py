"""Taking adapters out of a model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext

from torch import nn

from ...contract import managed
from ...contract.tree import Composite, tree
from ...errors import Refusal
from ...registry import kinds
from ..acting.on_model import base_of, forget_adapters, roster_of
from ..acting.roster import Roster
from ..adapted.calls import move_recorders
from ..adapted.layer import Adapted, adapted_layers
from ..prompts.attach import detach


def delete_all(model: nn.Module, names: str | Sequence[str]) -> None:
    """Remove one adapter or several, with a warning where another one acts then; all of them or none."""
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    roster = _deletable(model, names)
    acting = [n for n in names if n in roster.chosen]
    for name in names:
        delete(model, name)
    if acting and roster.chosen and not set(roster.chosen) & set(acting):
        warnings.warn(
            f"Adapter {', '.join(acting)} was active and is deleted; {', '.join(roster.chosen)} is active now.",
            stacklevel=4,
        )


def _deletable(model: nn.Module, names: Sequence[str]) -> Roster:
    roster = roster_of(model)
    for name in names:
        if roster is None or name not in roster.adapters:
            known = sorted(roster.adapters) if roster else "none"
            raise ValueError(f"Adapter {name} does not exist: not found among those loaded, {known}.")
    if roster is None:
        raise ValueError("This model has no adapters.")
    for layer in adapted_layers(model) if roster.merged_at else ():
        if merged := [n for n in names if n in layer.merged_adapters]:
            raise ValueError(
                f"Cannot delete adapter(s) {merged}: merged into {layer.path}. Please unmerge first (unmerge_adapter())."
            )
    return roster


def delete(model: nn.Module, name: str) -> None:
    """Remove an adapter everywhere; the base layers of places without adapters stay wrapped until `unload`."""
    roster = roster_of(model)
    with nullcontext() if roster is None else roster.gate.change():
        roster = _deletable(model, [name])
        whole = roster.adapters[name].whole_model
        roster.forget(name)  # first: who begins a call from now on does without it
        for layer in adapted_layers(model):
            layer.detach(name)
        if whole:
            detach(model, roster, name)


def check_unloadable(model: nn.Module) -> None:
    """Raise `Refusal` where the base model could not run by itself."""
    if managed.flat(model):
        raise Refusal(
            "unload",
            type(model).__name__,
            "FSDP 1 gathers its weights for the forward of the wrapper around it; save the adapter and merge it in one process",
        )


def unload(model: nn.Module) -> nn.Module:
    """Take all wrappers out; the base layers are what they hold now (merged or not)."""
    check_unloadable(model)
    for unit in managed.units([model]):
        if unit is not model and (base_of(unit) is model or getattr(unit, "model", None) is model):
            managed.hand_over(unit, model)
    roster = roster_of(model)
    with nullcontext() if roster is None else roster.gate.change():
        return _unload(model, roster)


def _unload(model: nn.Module, roster: Roster | None) -> nn.Module:
    for parent in list(model.modules()):
        for attr, child in list(parent._modules.items()):
            while isinstance(child, (Adapted, Composite)):
                if isinstance(child, Adapted):
                    move_recorders(child, child.base_layer)
                child = child.base_layer
                parent._modules[attr] = child
    for kind in kinds().values():
        kind.removed(tree(model))
    if roster is not None and any(a.whole_model for a in roster.adapters.values()):
        for name in list(roster.adapters):
            detach(model, roster, name)
    forget_adapters(model)
    return model
