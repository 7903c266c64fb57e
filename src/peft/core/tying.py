"""One set of parameters for all ends of a tied weight: `ensure_weight_tying`.

A head that holds a table's weights has its transpose as matrix, so what is trained at one end acts transposed at the
other. The parameters are made for the first end and handed to the others through `Site.shared`; files hold them where
they were made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from .method import Method, Site
from .targets import Place, other_ends


def wanted(config: Any) -> bool:
    return bool(getattr(config, "ensure_weight_tying", False))


def followers(config: Any, model: nn.Module, places: list[Place]) -> list[Place]:
    """The other ends of the targeted weights, where the config asks for them."""
    return other_ends(model, places) if wanted(config) else []


def shared(config: Any, sites: list[Site], make: Callable[[Site], dict[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
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


class Pair(Method):
    """A method of two free factors, ΔW = s·B A with A[r, fan_in] and B[out, r]. Tied ends share them: ΔWᵀ = s·Aᵀ Bᵀ."""

    pair_names: ClassVar[tuple[str, str]]  # the attributes that hold A and B
    follows = False  # the factors were made for another end of a tied weight
    turned = False  # … and stand for the transpose of this end's ΔW

    @classmethod
    def rank_at(cls, config: Any, path: str) -> int:
        raise NotImplementedError(f"{cls.__name__}.rank_at")

    @classmethod
    def followers(cls, config: Any, model: nn.Module, places: list[Place]) -> list[Place]:
        return followers(config, model, places)

    @classmethod
    def factors_for(cls, config: Any, site: Site) -> dict[str, nn.Parameter]:
        """Empty factors, by name."""
        r, g = cls.rank_at(config, site.path), site.geometry
        return dict(zip(cls.pair_names, (site.empty(r, g.fan_in), site.empty(g.out, r)), strict=True))

    @classmethod
    def shared(cls, config: Any, sites: list[Site], rng: torch.Generator) -> dict[str, nn.Parameter]:
        return shared(config, sites, lambda s: cls.factors_for(config, s))

    def place_factors(self, config: Any, site: Site) -> None:
        """Make the factors, or take those of the first end, which alone writes them to the file."""
        end = end_of(site)
        self.set(follows=end.follows, turned=end.turned)
        for name, p in (end.parts or self.factors_for(config, site)).items():
            self._parameters[name] = p
        if self.follows:
            self.repeats = tuple(self.keys[n] for n in self.pair_names)  # type: ignore[misc]
            self.keys = {n: k for n, k in self.keys.items() if n not in self.pair_names}  # type: ignore[misc]
