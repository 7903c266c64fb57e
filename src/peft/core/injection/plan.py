"""Putting adapters into a model, and taking them out.

Planning finds the places, checks every refusal and builds the methods without touching the model; committing hangs
them in. What is found wrong while planning leaves the model as it was.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from ...config import PeftConfig, TunerConfig
from ...contract.capabilities import Companion, Derives, Follows
from ...contract.cheap_modules import made_on_the_cpu
from ...contract.geometry import Geometry
from ...contract.kind import LayerKind
from ...contract.method import Method
from ...contract.site import Site
from ...contract.tree import Composite
from ...errors import Refusal, printable
from ...registry import companions, method, wrappers
from ..acting.mix import BASE
from ..acting.on_model import roster_of
from ..acting.roster import Adapter, Roster
from ..anatomy.bare_parameters import find_parameters
from ..anatomy.embeddings import embed, vocab_size
from ..anatomy.language import model_type, where
from ..anatomy.older_layouts import retarget
from ..anatomy.roles import fill_targets
from ..anatomy.targets import ALL_LINEAR, exactly, find, short_names, unfit
from ..anatomy.ties import other_ends
from ..anatomy.ties import wanted as tying_wanted
from ..anatomy.walk import Place

LONGEST_NAME = 255  # bytes


@dataclass
class Item:
    """One method at one place, planned."""

    place: Place | None  # None: the whole model
    brought_by: str  # "" for the adapter's own method, else the config field that brought it
    cls: type[Method]
    kind: LayerKind | None
    config: object  # of `cls`
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
        return sum(p.numel() for n, p in self.method.named_parameters() if n not in self.method.table.frozen)


@dataclass
class Plan:
    """All that an adapter will put into a model."""

    name: str
    config: PeftConfig
    items: list[Item]
    shared: dict[str, nn.Parameter] = field(default_factory=dict)
    roster: Roster | None = None  # that of the model, where it has adapters already
    passed_over: dict[str, str] = field(default_factory=dict)  # linear layers that `all-linear` leaves, and why

    def adapter(self) -> Adapter:
        methods = [(i.place.disk_path if i.place else "", i.method) for i in self.items]
        targeted = [i.path for i in self.items if not i.brought_by]
        parts = [i.brought_by for i in self.items]
        return Adapter(self.config, methods, parts, self.shared, targeted=targeted)  # type: ignore[arg-type]

    def composites(self) -> dict[str, Composite]:
        return {p.owner.disk_path: p.composite for i in self.items if (p := i.place) and p.owner and p.composite}


def check_name(roster: Roster | None, name: str) -> None:
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or any(c in name for c in "/\\\n\t")
        or printable(name) != name
    ):
        raise ValueError(f"Adapter name {name!r}: expected a name that a folder may have.")
    if name == BASE:
        raise ValueError(
            f"Adapter name {name!r}: in `adapter_names` this stands for rows without an adapter; use another."
        )
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"Adapter name {name[:20]!r}… is longer than the {LONGEST_NAME} bytes that a folder's name may have."
        )
    if roster is not None and name in roster.adapters:
        raise ValueError(
            f"Adapter with name {name} already exists. Loaded: {sorted(roster.adapters)}. Use another name, or delete it first."
        )


def seed_for(seed: int, path: str) -> int:
    """The seed of one site: a function of the adapter's seed and the site's name alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=7).digest(), "big")


@made_on_the_cpu()
def plan(
    model: nn.Module,
    config: PeftConfig,
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
    config.check()
    roster = roster_of(model)
    check_name(roster, name)
    cls = method(config.peft_type)
    cls.prepare(config, model)
    whole = cls.form == "prompt"  # its site is the whole model
    if not whole:
        role = getattr(config, "role", cls.role)
        fill_targets(cast(TunerConfig, config), role, model_type(model), cls.peft_type)
    items: list[Item] = []
    passed_over: dict[str, str] = {}
    everything = False
    model_config = getattr(model, "config", None)
    holders: dict[tuple[type[Method], int], str] = {}  # weight -> the path of the first site that has it

    def add(place: Place | None, brought_by: str, cls: type[Method], cfg: object) -> None:
        kind = place.kind if place else None
        site = _site(model, place, kind, model_config, autocast_adapter_dtype)
        weight = place.module._parameters.get("weight") if place else None
        if weight is not None and place is not None:
            first = holders.setdefault((cls, id(weight)), place.path)
            site.tied = first if first != place.path else ""
        items.append(Item(place, brought_by, cls, kind, cfg, site))

    if whole:
        add(None, "", cls, config)
    else:
        tuned = cast(TunerConfig, config)
        retarget(model, tuned, cls)
        wanted: list[Place] = []
        if only is not None:
            wanted += exactly(model, only)
        elif tuned.target_modules or not getattr(config, "target_parameters", None):
            wanted += find(model, tuned, strict)
            if tuned.target_modules == ALL_LINEAR:
                passed_over = unfit(model)
                everything = True
                tuned.target_modules = short_names(model, wanted)  # files name the modules, so that all read the same
        if getattr(config, "target_parameters", None):
            wanted += find_parameters(model, tuned)
        for place in [*wanted, *_followers(cls, tuned, model, wanted)]:
            add(place, "", cls, config)
    for field_name, companion in companions().items():
        if getattr(config, field_name, None) and getattr(config, field_name) != "none":
            assert issubclass(companion, Companion)
            places, sub = companion.accompany(config, model)
            for place in places:
                add(place, field_name, companion, sub)
    for item in items:
        _require_forward(item)
        item.cls.check(item.config, item.site)
    _build(items, plan_ := Plan(name, config, items, roster=roster, passed_over=passed_over), init, meta)
    refused = _refused(items)
    if refused and everything and len(refused) < sum(not i.brought_by for i in items):
        kept = [i.place for i in items if i.place and not i.brought_by and i.path not in refused]
        cast(TunerConfig, config).target_modules = short_names(model, kept)
        plan_ = plan(
            model, config, name, init=init, meta=meta, autocast_adapter_dtype=autocast_adapter_dtype, strict=strict
        )
        plan_.passed_over = {**passed_over, **{path: str(e) for path, e in refused.items()}}
    elif refused:
        raise next(iter(refused.values()))
    if plan_.passed_over and not meta:
        path, why = next(iter(plan_.passed_over.items()))
        warnings.warn(
            f"all-linear passes over {len(plan_.passed_over)} layers that cannot be adapted, {path} for one: {why}.",
            stacklevel=2,
        )
    return plan_


def _refused(items: list[Item]) -> dict[str, Refusal]:
    """What the layers' kinds say against the methods planned for them, by path."""
    refused = {}
    for item in items:
        if item.kind is not None and item.place is not None and item.method is not None:
            try:
                item.kind.admit(item.place.module, item.method, item.path)
            except Refusal as e:
                refused[item.path] = e
    return refused


def _require_forward(item: Item) -> None:
    """What acts in a module's own forward needs one: a list of modules has none, and its owner goes through it."""
    module = None if item.place is None else item.place.module
    if module is not None and type(module).forward is nn.Module.forward and item.site.geometry.weightless:
        raise TypeError(
            f"{item.brought_by or item.cls.peft_type} cannot be applied to modules of type {type(module)}: {item.path} "
            "is only a container, so that nothing calls it. Name the modules in it."
        )


def _followers(cls: type[Method], config: TunerConfig, model: nn.Module, places: list[Place]) -> list[Place]:
    """The other ends of tied weights that must change along; refused where the method has no counterpart for them."""
    if issubclass(cls, Follows):
        return cls.followers(config, model, places)
    if tying_wanted(config):
        weights = [id(w) for p in places if (w := p.module._parameters.get("weight")) is not None]
        if len(set(weights)) < len(weights) or other_ends(model, places):
            raise Refusal(
                cls.peft_type,
                "a tied weight",
                "ensure_weight_tying asks that all of its ends change alike, and only factors that can be transposed, or "
                "rows, have a counterpart at the other end",
            )
    return []


def _made(cls: type[Method], config: object, site: Site) -> Method:
    """The method object for one site, inside the wrappers that the config asks for (DoRA over any delta)."""
    made = cls(config, site)
    for field_name, wrapper in wrappers().items():
        if made.form == "delta" and getattr(config, field_name, False):
            made = wrapper(config, site, made)  # type: ignore[call-arg]
    return made


def _site(model: nn.Module, place: Place | None, kind: LayerKind | None, config: object, autocast: bool) -> Site:
    if place is None or kind is None:
        first = next((p for p in model.parameters() if p.is_floating_point()), None)
        dtype = first.dtype if first is not None else torch.float32
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
        opaque=kind.why_opaque(module),
        config=config,
    )


def _require_real(m: Method, site: Site) -> None:
    """Raise unless a complex layer can have this method: terms to add that start without a look at W."""
    table = site.geometry.indexed  # torch differentiates no lookup of complex numbers
    if m.form == "delta" and not (isinstance(m, Derives) and m.derives) and not m.dropout and not table:
        return
    what = "training a table" if table else "dropout" if m.dropout else "more than a term that is added to it"
    raise Refusal(m.peft_type, f"{site.path} ({site.layer})", f"its weight is complex, for which {what} is not defined")


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
        numbers = [s.dtype for s in sites]
        for s in sites:
            s.dtype = s.dtype.to_real()  # complex adapters start from real numbers: none else can be drawn
            s.device = build_on if s.device.type != "meta" else s.device
        shared = cls.shared_tensors(group[0].config, sites, rng)
        plan.shared.update(shared)
        for item, site, device, number in zip(group, sites, real, numbers, strict=True):
            site.shared = shared
            item.method = m = _made(item.cls, item.config, site)
            m.set(device=device)
            path = f"{item.brought_by}:{site.path}" if item.brought_by else site.path
            if number.is_complex:
                _require_real(m, site)
            if site.device.type != "meta":
                if isinstance(m, Derives) and m.derives:
                    m.derive(rng.manual_seed(seed_for(0, path)), site)
                if init:
                    with torch.no_grad():
                        m.reset(rng.manual_seed(seed_for(seed, path)), site)
                if device != site.device:
                    m.to(device)
            if number != site.dtype:
                for p in m.parameters():
                    p.data = p.data.to(number)
            site.device, site.dtype = device, number
