"""Methods of two free factors, which the ends of a tied weight can share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ...contract.method import Method
from ...contract.site import Site
from ..anatomy.ties import end_of, followers, shared_by_ends
from ..anatomy.walk import Place


class LowRank(Method):
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
    def shared_tensors(cls, config: Any, sites: list[Site], rng: torch.Generator) -> dict[str, nn.Parameter]:
        return shared_by_ends(config, sites, lambda s: cls.factors_for(config, s))

    def place_factors(self, config: Any, site: Site) -> None:
        """Make the factors, or take those of the first end, which alone writes them to the file."""
        end = end_of(site)
        self.set(follows=end.follows, turned=end.turned)
        for name, p in (end.parts or self.factors_for(config, site)).items():
            self._parameters[name] = p
        if self.follows:
            self.repeats = tuple(self.keys[n] for n in self.pair_names)  # type: ignore[misc]
            self.keys = {n: k for n, k in self.keys.items() if n not in self.pair_names}  # type: ignore[misc]
