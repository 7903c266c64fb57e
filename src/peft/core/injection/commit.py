"""Hanging a plan's methods into the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...config import PeftConfig
from ...contract.capabilities import TakesSpan
from ...contract.cheap_modules import uninterrupted
from ...contract.tree import Composite, tree
from ...registry import kinds
from ..acting.on_model import rebind_later
from ..acting.roster import Roster
from ..acting.watch import watch
from ..adapted.layer import Adapted, adapted_layers
from ..anatomy.walk import Place
from ..prompts.attach import attach
from .lists import follow
from .plan import Plan, plan
from .schedules import watch as watch_schedule
from .sharded import warn_if_late
from .shared import together


def commit(model: nn.Module, plan: Plan) -> Roster:
    """Hang the planned methods into the model."""
    roster = plan.roster or Roster()
    modules = list(tree(model))
    if not roster.adapters:
        for module in modules:
            for p in module._parameters.values():
                if p is not None:
                    p.requires_grad = False
    model.__dict__["_peft_roster"] = roster
    if roster.forgotten:  # left behind where loading adapters of these names had failed
        for wrapped in adapted_layers(model):
            for name in roster.forgotten.intersection(wrapped.methods):
                wrapped.detach(name)
        roster.forgotten.clear()
    dtype = _floating(model)
    replaced: dict[int, nn.Module] = {}
    for item in plan.items:
        assert item.method is not None
        if item.place is None:
            with roster.gate.change():
                attach(model, roster, plan.name, item.method)
            continue
        place, owner = item.place, item.place.owner
        if owner is not None:
            assert place.composite is not None
            _stand_in(owner, place.composite)
            replaced[id(owner.module)] = owner.held
        layer = place.held
        if not isinstance(layer, Adapted):
            assert item.kind is not None
            held = layer if isinstance(layer, Composite) else place.module
            layer = Adapted(held, item.kind, roster, place.path, item.site.geometry)
            place.parent._modules[place.attr] = replaced[id(held)] = layer
            item.kind.adopted(place.module, dtype)
        layer.attach(plan.name, item.brought_by, item.method)
        if item.method.training != layer.training:
            item.method.train(layer.training)
    follow(modules, replaced)
    first = not roster.adapters
    roster.adapters[plan.name] = adapter = plan.adapter()
    together(roster, adapter)
    roster.configs[plan.name] = plan.config
    roster.composites.update(plan.composites())
    if first:
        roster.activate([plan.name])
    roster.set_trainable(plan.name, plan.name in roster.chosen and not plan.config.inference_mode)
    watch_schedule(roster, plan.name)
    if not plan.config.inference_mode:
        warn_if_late(model, plan.name)
    if any(issubclass(item.cls, TakesSpan) for item in plan.items):
        with roster.gate.change():  # hooks, which a call may just be walking through
            watch(model, roster)
    if any(item.place is not None and item.place.composite is not None for item in plan.items):
        modules = list(tree(model))  # stand-ins stand where modules stood
    for kind in kinds().values():
        kind.installed(modules)
    roster.bind_checkpointing(modules)
    rebind_later(model, roster)
    return roster


def _stand_in(owner: Place, composite: Composite) -> None:
    """Put a composite where its module stands: in the tree, or inside the wrapper that adapts the module as a whole."""
    outer = owner.adapted
    if isinstance(owner.held if outer is None else outer.base_layer, Composite):
        return
    composite.train(owner.held.training)
    if outer is None:
        owner.parent._modules[owner.attr] = composite
    else:
        outer.base_layer = outer.op.base = composite


def _floating(model: nn.Module) -> torch.dtype:
    """The dtype that the model computes in, by its config or its first floating parameter."""
    stated = getattr(getattr(model, "config", None), "dtype", None)
    if isinstance(stated, torch.dtype):
        return stated
    wide = (p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1)  # else: codes
    return next(wide, torch.get_default_dtype())


def inject(model: nn.Module, config: PeftConfig, name: str = "default", **options: Any) -> Roster:
    """Plan and commit."""
    with uninterrupted():
        return commit(model, plan(model, config, name, **options))
