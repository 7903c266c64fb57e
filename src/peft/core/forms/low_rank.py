"""Methods of two free factors, which the ends of a tied weight can share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ...contract.capabilities import TwoFactors
from ...contract.method import Method
from ...contract.site import Op, Site
from ...kernels.terms import Banks, Thin
from ..anatomy.ties import end_of, followers, shared_by_ends
from ..anatomy.walk import Place


class LowRank(TwoFactors, Method):
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
    def shared_tensors(cls, config: Any, sites: list[Site], rng: torch.Generator) -> dict[str, nn.Parameter]:
        def factors(site: Site) -> dict[str, nn.Parameter]:
            r, g = cls.rank_at(config, site.path), site.geometry
            return dict(zip(cls.pair_names, (site.empty(r, g.fan_in), site.empty(g.out, r)), strict=True))

        return shared_by_ends(config, sites, factors)

    def create(self, site: Site, given: Mapping[str, nn.Parameter] | None = None) -> None:
        """Make the factors, or take those of the first end, which alone writes them to the file."""
        end = end_of(site)
        super().create(site, end.parts)
        if end.follows:
            self.set(follows=True, turned=end.turned, table=self.table.of_another(*self.pair_names, repeated=True))

    def fused_term(self, op: Op) -> Thin | Banks | None:
        return Thin(*self.two_factors()) if self.plain_delta else None
