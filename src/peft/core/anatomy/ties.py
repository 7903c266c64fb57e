"""Tied weights: who holds the very same parameter, and what its ends share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from ...contract.site import Site
from .walk import Place, walk


def shared_parameters(model: nn.Module) -> set[int]:
    """ids of parameters that more than one module holds (tied weights)."""
    count: Counter[int] = Counter()
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                count[id(p)] += 1
    return {i for i, n in count.items() if n > 1}


def shared_storages(model: nn.Module) -> set[int]:
    """Addresses of memory that more than one parameter lies in, tied or as views of one buffer."""
    count = Counter(
        p.untyped_storage().data_ptr()
        for m in model.modules()
        for p in m._parameters.values()
        if type(p) is nn.Parameter  # subclasses (quantised, sharded) may have no storage of their own
    )
    return {at for at, n in count.items() if n > 1}


def other_ends(model: nn.Module, places: list[Place]) -> list[Place]:
    """Further modules that hold the very weights of these: the other ends of tied weights."""
    weights = {id(w) for p in places if (w := p.module._parameters.get("weight")) is not None}
    have = {p.path for p in places}
    return [p for p in walk(model) if p.path not in have and id(p.module._parameters.get("weight")) in weights]


def state_untied(model: nn.Module) -> bool:
    """Let the model's config say that its word embeddings are not tied; whether it said they were."""
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return False
    config.tie_word_embeddings = False
    return True


def state_tied(model: nn.Module) -> None:
    """Let the model's config say so again."""
    if (config := getattr(model, "config", None)) is not None:
        config.tie_word_embeddings = True


def wanted(config: object) -> bool:
    return bool(getattr(config, "ensure_weight_tying", False))


def followers(config: object, model: nn.Module, places: list[Place]) -> list[Place]:
    """The other ends of the targeted weights, where the config asks for them."""
    return other_ends(model, places) if wanted(config) else []


def shared_by_ends(
    config: object, sites: list[Site], make: Callable[[Site], dict[str, nn.Parameter]]
) -> dict[str, nn.Parameter]:
    """What `make` makes for the first end of each tied weight."""
    first = {s.tied for s in sites if s.tied} if wanted(config) else set()
    return {_key(s.path, s, n): p for s in sites if s.path in first for n, p in make(s).items()}


@dataclass(frozen=True)
class End:
    """What a site has of a tied weight: `parts` by name, if they are shared; follows: another end has made them; turned:
    that end is a table and this one a matrix, or the reverse."""

    parts: Mapping[str, nn.Parameter] = field(default_factory=dict)
    follows: bool = False
    turned: bool = False


ALONE = End()


def end_of(site: Site) -> End:
    if not site.shared:
        return ALONE
    for path, turned in ((site.path, False), (site.tied, False), (site.tied, True)):
        start = _key(path, site, "", turned)
        parts = {k.removeprefix(start): p for k, p in site.shared.items() if k.startswith(start)}
        if parts:
            return End(parts, path != site.path, turned)
    return ALONE


def _key(path: str, site: Site, name: str, turned: bool = False) -> str:
    return f"{path}:{'table' if site.geometry.indexed != turned else 'matrix'}:{name}"
