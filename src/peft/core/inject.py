"""Putting adapters into a model, and taking them out.

Planning finds the places, checks every refusal and builds the methods without touching the model; committing hangs
them in. What is found wrong while planning leaves the model as it was.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..registry import companions, kinds, method
from . import older
from .adapted import Adapted, Record, adapted_layers, move_recorders
from .checkpoint import vocab_size
from .errors import NoMatchingPeftModuleError
from .layer import Composite, Geometry, LayerKind, tree
from .light import uninterrupted
from .method import Method, Site
from .mix import Adapter, Hub
from .span import unwatch, watch
from .targets import ALL_LINEAR, Place, exactly, find, shared_parameters, shared_storages, short_names, walk
from .weights import finite


def hub_of(model: nn.Module) -> Hub | None:
    """The adapters of a model (the base model, or anything that wraps it)."""
    hub = model.__dict__.get("_peft_hub")
    if hub is not None and hub.placed and next(adapted_layers(model), None) is None:
        _clear(model)  # a library took the wrappers out by itself: the base layers stand bare
        hub = None
    if hub is None:
        held = ((m.hub if isinstance(m, Adapted) else m.__dict__.get("_peft_hub")) for m in tree(model, wrappers=True))
        hub = next((h for h in held if h is not None), None)
    return hub


@dataclass
class Item:
    """One method at one place, planned."""

    place: Place | None  # None: the whole model
    part: str  # "" for the adapter's own method, else the config field that brought it
    cls: type[Method]
    kind: LayerKind | None
    config: Any
    site: Site
    method: Method | None = None

    @property
    def path(self) -> str:
        return self.place.path if self.place else ""

    @property
    def shape(self) -> tuple[int, int] | None:
        g = self.site.geometry
        return None if g.weightless else (g.out, g.fan_in)

    @property
    def parameters(self) -> int:
        assert self.method is not None
        return sum(p.numel() for n, p in self.method.named_parameters() if n not in self.method.frozen())


@dataclass
class Plan:
    """All that an adapter will put into a model."""

    name: str
    config: Any
    items: list[Item]
    shared: dict[str, nn.Parameter] = field(default_factory=dict)
    hub: Hub | None = None  # that of the model, where it has adapters already

    def adapter(self) -> Adapter:
        methods = [(i.place.stem if i.place else "", i.method) for i in self.items]
        targeted = [i.path for i in self.items if not i.part]
        parts = [i.part for i in self.items]
        return Adapter(self.config, methods, parts, self.shared, targeted=targeted)  # type: ignore[arg-type]

    def composites(self) -> dict[str, Composite]:
        return {p.owner.stem: p.composite for i in self.items if (p := i.place) and p.owner and p.composite}


def check_name(hub: Hub | None, name: str) -> None:
    if not isinstance(name, str) or not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"Adapter name {name!r}: expected a name that a folder may have.")
    if hub is not None and name in hub.adapters:
        raise ValueError(
            f"Adapter with name {name} already exists. Loaded: {sorted(hub.adapters)}. Use another name, or delete it first."
        )


def seed_for(seed: int, path: str) -> int:
    """The seed of one site: a function of the adapter's seed and the site's name alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=7).digest(), "big")


def plan(
    model: nn.Module,
    config: Any,
    name: str = "default",
    *,
    init: bool = True,
    meta: bool = False,
    autocast_adapter_dtype: bool = True,
    strict: bool = True,
    only: Collection[str] | None = None,
) -> Plan:
    """Everything `config` would put into `model`; the model is not changed.

    init: draw initial values (not needed when weights are loaded next). meta: parameters on the meta device.
    autocast_adapter_dtype: keep fp32 master weights on half-precision bases. strict: refuse target names that match
    nothing, else warn. only: the paths to target, whatever the config says.
    """
    hub = hub_of(model)
    check_name(hub, name)
    cls = method(config.peft_type)
    cls.prepare(config, model)
    items: list[Item] = []
    model_config = getattr(model, "config", None)
    holders: dict[tuple[type[Method], int], str] = {}  # weight -> the path of the first site that has it

    def add(place: Place | None, part: str, cls: type[Method], cfg: Any) -> None:
        kind = place.kind if place else None
        site = _site(model, place, kind, model_config, autocast_adapter_dtype)
        weight = place.module._parameters.get("weight") if place else None
        if weight is not None and place is not None:
            first = holders.setdefault((cls, id(weight)), place.path)
            site.tied = first if first != place.path else ""
        items.append(Item(place, part, cls, kind, cfg, site))

    if cls.form == "prompt":
        add(None, "", cls, config)
    else:
        older.retarget(model, config, cls)
        wanted: list[Place] = []
        if only is not None:
            wanted += exactly(model, only)
        elif config.target_modules or not getattr(config, "target_parameters", None):
            wanted += find(model, config, strict)
            if config.target_modules == ALL_LINEAR:
                config.target_modules = short_names(model, wanted)  # files name the modules, so that all read the same
        if getattr(config, "target_parameters", None):
            from .parameters import find_parameters

            wanted += find_parameters(model, config)
        for place in [*wanted, *cls.followers(config, model, wanted)]:
            add(place, "", cls, config)
    for field_name, companion in companions().items():
        if getattr(config, field_name, None) and getattr(config, field_name) != "none":
            places, sub = companion.accompany(config, model)
            for place in places:
                add(place, field_name, companion, sub)
    for item in items:
        item.cls.check(item.config, item.site)
    _build(items, plan_ := Plan(name, config, items, hub=hub), init, meta)
    for item in items:
        if item.kind is not None and item.place is not None:
            item.kind.admit(item.place.module, item.method, item.path)
    return plan_


def _site(model: nn.Module, place: Place | None, kind: LayerKind | None, config: Any, autocast: bool) -> Site:
    if place is None or kind is None:
        first = next((p for p in model.parameters() if p.is_floating_point()), None)
        dtype = first.dtype if first is not None else torch.float32
        from .prompt import embed, where

        device = where(model)

        return Site(
            "",
            Geometry(0, 0, 0),
            _nothing,
            dict,
            dict,
            device,
            _master(dtype, autocast),
            type(model).__name__,
            config=config,
            embed=functools.partial(embed, model),
            vocabulary=vocab_size(model) or 0,
        )
    module = place.module
    adapted = place.adapted
    if adapted is not None and adapted.merged:
        raise ValueError(
            f"{place.path} is merged with {adapted.merged_adapters}: call unmerge_adapter() before adding adapters."
        )
    return Site(
        place.path,
        kind.geometry(module),
        lambda: kind.read(module),
        lambda: kind.parameters(module),
        lambda: kind.buffers(module),
        kind.device(module),
        _master(kind.dtype(module), autocast),
        kind.name,
        config=config,
    )


def _nothing() -> torch.Tensor:
    raise ValueError("the whole model has no single weight matrix")


def _master(dtype: torch.dtype, autocast: bool) -> torch.dtype:
    """fp32 master weights on half-precision bases, as mixed-precision training needs."""
    low = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if (low and autocast) or dtype.itemsize == 1 else dtype


def _build(items: list[Item], plan: Plan, init: bool, meta: bool) -> None:
    seed = getattr(plan.config, "seed", None)
    if seed is None:
        seed = int(torch.randint(2**31, (1,)).item()) if init else 0
    by_class: dict[type[Method], list[Item]] = {}
    for item in items:
        by_class.setdefault(item.cls, []).append(item)
    for cls, group in by_class.items():
        rng = torch.Generator().manual_seed(seed_for(seed, "shared"))
        build_on = torch.device("meta") if meta else torch.device("cpu")
        sites = [i.site for i in group]
        real = [s.device for s in sites]
        for s in sites:
            s.device = build_on if s.device.type != "meta" else s.device
        shared = cls.shared(group[0].config, sites, rng)
        plan.shared.update(shared)
        for item, site, device in zip(group, sites, real, strict=True):
            site.shared = shared
            item.method = m = item.cls.build(item.config, site)
            m.set(home=device)
            path = f"{item.part}:{site.path}" if item.part else site.path
            if site.device.type != "meta":
                if m.derives:
                    m.derive(rng.manual_seed(seed_for(0, path)), site)
                if init:
                    with torch.no_grad():
                        m.reset(rng.manual_seed(seed_for(seed, path)), site)
                if device != site.device:
                    m.to(device)
            site.device = device


def commit(model: nn.Module, plan: Plan) -> Hub:
    """Hang the planned methods into the model."""
    hub = plan.hub or Hub()
    modules = list(tree(model))
    if not hub.adapters:
        for module in modules:
            for p in module._parameters.values():
                if p is not None:
                    p.requires_grad = False
    model.__dict__["_peft_hub"] = hub
    if plan.name in hub.forgotten:
        for wrapped in adapted_layers(model):
            if plan.name in wrapped.methods:
                wrapped.detach(plan.name)  # left behind where loading an adapter of this name had failed
        hub.forgotten.discard(plan.name)
    dtype = _floating(model)
    for item in plan.items:
        assert item.method is not None
        if item.place is None:
            from .prompt import attach

            attach(model, hub, plan.name, item.method)
            continue
        place, owner = item.place, item.place.owner
        if owner is not None:
            assert place.composite is not None
            _stand_in(owner, place.composite)
        layer = place.held
        if not isinstance(layer, Adapted):
            assert item.kind is not None
            held = layer if isinstance(layer, Composite) else place.module
            layer = Adapted(held, item.kind, hub, place.path, item.site.geometry)
            place.parent._modules[place.attr] = layer
            item.kind.adopted(place.module, dtype)
        layer.attach(plan.name, item.part, item.method)
        if item.method.training != layer.training:
            item.method.train(layer.training)
    first = not hub.adapters
    hub.adapters[plan.name] = plan.adapter()
    hub.configs[plan.name] = plan.config
    hub.composites.update(plan.composites())
    if first:
        hub.activate([plan.name])
    hub.set_trainable(plan.name, plan.name in hub.chosen and not plan.config.inference_mode)
    if any(item.cls.located for item in plan.items):
        watch(model, hub)
    if any(item.place is not None and item.place.composite is not None for item in plan.items):
        modules = list(tree(model))  # stand-ins stand where modules stood
    for kind in kinds().values():
        kind.installed(modules)
    hub.bind_checkpointing(modules)
    _rebind_later(model, hub)
    return hub


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
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _rebind_later(model: nn.Module, hub: Hub) -> None:
    """Checkpointing that is switched on later must remember the adapters, too."""
    enable = getattr(model, "_set_gradient_checkpointing", None)
    if enable is None or "_set_gradient_checkpointing" in model.__dict__:
        return
    model.__dict__["_set_gradient_checkpointing"] = _Rebind(model)


class _Rebind:
    """Picklable stand-in for `model._set_gradient_checkpointing` that binds the blocks it switched on."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = type(self.model)._set_gradient_checkpointing(self.model, *args, **kwargs)  # type: ignore[attr-defined]
        hub = hub_of(self.model)
        if hub is not None:
            hub.bind_checkpointing(tree(self.model))
        return result


def inject(model: nn.Module, config: Any, name: str = "default", **options: Any) -> Hub:
    """Plan and commit."""
    with uninterrupted():
        return commit(model, plan(model, config, name, **options))


def delete(model: nn.Module, name: str) -> None:
    """Remove an adapter everywhere; the base layers of places without adapters stay wrapped until `unload`."""
    hub = hub_of(model)
    if hub is None or name not in hub.adapters:
        raise ValueError(f"Adapter {name} does not exist. Loaded: {sorted(hub.adapters) if hub else 'none'}.")
    for layer in adapted_layers(model):
        if name in layer.merged_adapters:
            raise ValueError(f"Adapter {name} is merged into {layer.path}: call unmerge_adapter() before deleting it.")
    for layer in adapted_layers(model):
        layer.detach(name)
    if any(m.form == "prompt" for _, m in hub.adapters[name].methods):
        from .prompt import detach

        detach(model, hub, name)
    hub.forget(name)


def unload(model: nn.Module) -> nn.Module:
    """Take all wrappers out; the base layers are what they hold now (merged or not)."""
    hub = hub_of(model)
    for parent in list(model.modules()):
        for attr, child in list(parent._modules.items()):
            while isinstance(child, (Adapted, Composite)):
                if isinstance(child, Adapted):
                    move_recorders(child, child.base_layer)
                child = child.base_layer
                parent._modules[attr] = child
    for kind in kinds().values():
        kind.removed(tree(model))
    if hub is not None and any(m.form == "prompt" for a in hub.adapters.values() for _, m in a.methods):
        from .prompt import detach

        for name in list(hub.adapters):
            detach(model, hub, name)
    _clear(model)
    return model


def _clear(model: nn.Module) -> None:
    """Forget the adapters where the model keeps them."""
    for module in (model, getattr(model, "model", None)):
        if isinstance(module, nn.Module):
            module.__dict__.pop("_set_gradient_checkpointing", None)
    unwatch(model)
    model.__dict__.pop("_peft_hub", None)
    model.__dict__.pop("peft_config", None)


# -- merging --------------------------------------------------------------------------------------------------------------
def merge(model: nn.Module, names: list[str] | None = None, safe: bool = False, keep: bool = True) -> Iterator[str]:
    """Write adapters into the base weights, layer by layer, yielding paths. All refusals come before any write."""
    hub = hub_of(model)
    if hub is None:
        raise ValueError("This model has no adapters to merge.")
    wanted = list(names) if names is not None else list(hub.chosen)
    hub.known(wanted)
    from .errors import Refusal

    for name in wanted:
        for stem, m in hub.adapters[name].methods:
            if not m.mergeable:
                raise Refusal(
                    m.peft_type, f"{stem or 'the model'} (merge)", "its effect is no change of the base weights"
                )
            for attr, p in m.named_parameters():
                if p.is_floating_point() and not finite(p):
                    raise ValueError(f"Adapter {name!r}: {stem}.{attr} holds NaN or inf; nothing was merged.")
    layers = [x for x in adapted_layers(model) if any(n in x.methods and n not in x.merged_adapters for n in wanted)]
    for layer in layers:
        if layer.kind.merge_refusal(layer.base_layer):
            raise Refusal("merge", layer.path, layer.kind.merge_refusal(layer.base_layer))
    if safe:
        for layer in layers:
            layer.merged_values(layer.active_methods(_also(layer, wanted)))
    tied = shared_parameters(model)
    taken = None if keep else shared_storages(model)
    done: list[tuple[Adapted, Record]] = []
    try:
        for layer in layers:
            before = layer.record
            if not (taken is not None and layer.merge_in_place(wanted, taken)) and layer.merge_also(wanted, keep, tied):
                _untie_config(model, hub)
            done.append((layer, before))
            yield layer.path
    except ValueError:
        for layer, before in done:
            layer.merge_as(before)
        raise


def _also(layer: Adapted, wanted: list[str]) -> list[str]:
    return [*layer.merged_adapters, *(n for n in wanted if n in layer.methods and n not in layer.merged_adapters)]


def _untie_config(model: nn.Module, hub: Hub) -> None:
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
        hub.untied = True


def unmerge(model: nn.Module) -> None:
    """Restore the kept weights of every merged layer, and tied weights with them."""
    for layer in adapted_layers(model):
        layer.unmerge()
    hub = hub_of(model)
    if hub is not None and hub.untied:
        model.config.tie_word_embeddings = True  # type: ignore[union-attr]
        hub.untied = False


def dry_run(model: nn.Module, config: Any) -> list[Item]:
    """What `config` would adapt, as rows with .path, .kind, .shape, .parameters; raises what get_peft_model would."""
    base = getattr(model, "base_model", model)
    base = getattr(base, "model", base) if hub_of(model) is not None and hasattr(base, "model") else model
    rows = plan(base, copy.deepcopy(config), name="%dry", init=False, meta=True).items
    if not rows:
        raise NoMatchingPeftModuleError("the config targets nothing")
    return rows


__all__ = [
    "Item",
    "Plan",
    "commit",
    "delete",
    "dry_run",
    "hub_of",
    "inject",
    "merge",
    "plan",
    "unload",
    "unmerge",
    "walk",
]
