"""Adapters made on an older layout of a model, for models of transformers that changed theirs.

Renamed modules: transformers knows the old names of its models, and they are tried on keys that fit nowhere. Experts
that were separate linear layers, and are stacked in one parameter now: U = [W₁; W₃] of each expert. ΔU = [s·B₁A₁; s·B₃A₃]
is one product again, of the factors A = [A₁; A₃] and B = diag(B₁, B₃), so an old adapter becomes a new one with the very
same ΔW and the sum of the ranks. A method says by `Stored.join` that its tensors can be put together like this.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ...config import TunerConfig
from ...contract.capabilities import TwoFactors
from ...contract.method import Method
from ...contract.tree import Composite, tree
from .language import model_type
from .patterns import matches, means
from .targets import ALL_LINEAR
from .walk import Place, kind_of, walk

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter, WeightRenaming


@dataclass
class Stack:
    """A parameter that holds, for each expert, what were separate linear layers, one above the other."""

    path: str  # of the module that holds it
    name: str
    experts: int
    former: tuple[str, ...]  # the layers' names below `<path>.<expert>.`
    was: str  # the module's older path

    @property
    def full(self) -> str:
        return f"{self.path}.{self.name}"

    def layers(self, which: str) -> Iterator[str]:
        """The old paths of one of the layers, under both names of the module."""
        return (f"{path}.{e}.{which}" for path in dict.fromkeys((self.path, self.was)) for e in range(self.experts))


def renamings_and_conversions(model: nn.Module) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """transformers' renamings of keys for this model, and its conversions of tensors."""
    if model_type(model) is None:
        return [], []
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:  # an older transformers, whose models have the older layout
        return [], []
    if not isinstance(model, PreTrainedModel):
        return [], []
    every = get_model_conversion_mapping(model, add_legacy=False)
    return [c for c in every if isinstance(c, WeightRenaming)], [c for c in every if isinstance(c, WeightConverter)]


def stacked_experts(model: nn.Module, places: list[Place]) -> list[Stack]:
    """The stacked parameters of a model whose older layout had separate layers."""
    held = [(p.path, n, t) for p in places if p.owner is None for n, t in p.module._parameters.items()]
    three = [(path, n, t.shape[0]) for path, n, t in held if t is not None and t.dim() == 3]
    if not three:
        return []
    renamings, converters = renamings_and_conversions(model)
    out = []
    for path, name, experts in three:
        for c in converters:
            ops = [type(op).__name__ for op in c.operations]
            if ops not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) or len(c.target_patterns) != 1:
                continue
            if f".{path}.{name}".endswith("." + c.target_patterns[0].removeprefix(".")):
                former = tuple(s.removesuffix(".weight").rpartition("*.")[2] for s in c.source_patterns)
                was = path.removesuffix(_holder(c.target_patterns[0])) + _holder(c.source_patterns[0], "*.")
                out.append(Stack(path, name, experts, former, _former_path(was, renamings)))
                break
    return out


def _holder(pattern: str, end: str = ".") -> str:
    """The path of the module before the last part of a conversion's pattern."""
    return pattern.rpartition(end)[0].strip(".")


def _former_path(path: str, renamings: list[WeightRenaming]) -> str:
    old = path + "."
    for r in reversed(renamings):
        try:
            old = r.reverse_transform().rename_source_key(old)[0]
        except (ValueError, IndexError, re.error):  # a renaming that has no inverse
            continue
    return old.removesuffix(".")


def retarget(model: nn.Module, config: TunerConfig, cls: type[Method]) -> None:
    """Point a config that names layers of the older layout (or all linear ones) at the parameters that hold them now."""
    wanted = config.target_modules
    if not wanted or not cls.table.joins or model_type(model) is None:
        return
    if not any(p.dim() == 3 for m in tree(model) for p in m._parameters.values() if p is not None):
        return
    places = list(walk(model))
    found = stacked_experts(model, places)
    if not found:
        return
    every = wanted == ALL_LINEAR
    excluded = getattr(config, "exclude_modules", None)
    named = list(config.target_parameters or [])
    gone: set[str] = set()  # target names that meant stacked layers
    add: list[str] = []
    for stack in found:
        hit = [
            f
            for f in stack.former
            if every
            or any(
                matches(wanted, p, "target_modules") and not matches(excluded, p, "exclude_modules")
                for p in stack.layers(f)
            )
        ]
        if not every and not isinstance(wanted, str):
            gone |= {t for t in wanted for f in stack.former for p in stack.layers(f) if means(t, p)}
        if not hit or any(means(t, stack.full) for t in named):
            continue
        if len(hit) < len(stack.former):
            rest = ", ".join(f for f in stack.former if f not in hit)
            raise ValueError(
                f"target_modules name {', '.join(hit)}, but {stack.full} holds these layers together with {rest}: "
                f"name {rest}, too, or {stack.name} in target_parameters."
            )
        assert issubclass(cls, TwoFactors)
        cls.join(config, stack.full, [next(iter(stack.layers(f))) for f in stack.former])
        add.append(stack.name)
    blocks = {s.path.rpartition(".")[0]: s.was.rpartition(".")[0] for s in found}
    for place in places:
        block, _, leaf = place.path.rpartition(".")
        if block not in blocks or not _router(place):
            continue
        old = [f"{b}.{leaf}" for b in dict.fromkeys((block, blocks[block]))]
        if every or any(
            matches(wanted, p, "target_modules") and not matches(excluded, p, "exclude_modules") for p in old
        ):
            add.append(f"{leaf}.weight")
            if not every and not isinstance(wanted, str):
                gone |= {t for t in wanted for p in old if means(t, p)}
    if not add and not gone:
        return
    config.target_parameters = [*named, *(n for n in dict.fromkeys(add) if n not in named)]
    layers = [p.path for p in places if not _router(p)]
    if isinstance(wanted, str):
        chosen = [p.path for p in places if p.owner is None and matches(wanted, p.path, "target_modules")]
        if not every and (
            not chosen or set(chosen) - set(layers)
        ):  # a regex cannot leave out the routers that it matches
            config.target_modules = [p for p in chosen if p in layers]
    else:
        config.target_modules = [t for t in wanted if t not in gone or any(means(t, p) for p in layers)]


def _router(place: Place) -> bool:
    """A module of a block of experts that was a linear layer and has its weight alone now."""
    if place.owner is not None or isinstance(place.held, Composite):
        return isinstance(place.held, Composite) and _flat(place.module)
    return _flat(place.module) and kind_of(place.module).geometry(place.module).weightless


def _flat(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2
