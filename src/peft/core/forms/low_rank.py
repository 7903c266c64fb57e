"""Methods of two free factors, ΔW = s·B A with A[r, fan_in] and B[out, r]: all of them but their strength and their start.

The ends of a tied weight can share the factors, ΔWᵀ = s·Aᵀ Bᵀ. A start that decomposes W gives initial factors B₀ A₀,
which are held frozen and subtracted, ΔW = s(B A − B₀ A₀), so that a fresh adapter is the identity and W never changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from ...config import PeftConfig
from ...contract.capabilities import Derives, Follows, TwoFactors
from ...contract.method import Method
from ...contract.refusals import refusal
from ...contract.site import Op, Site
from ...kernels.terms import Banks, Thin
from ..anatomy.patterns import for_path, to_patterns, with_value
from ..anatomy.ties import end_of, followers, shared_by_ends
from ..anatomy.walk import Place

Fill: TypeAlias = Callable[[Tensor, Tensor, torch.Generator, Site], None]
Decompose: TypeAlias = Callable[[Tensor, Tensor, torch.Generator, Site, float, str], tuple[Tensor, Tensor]]
C = TypeVar("C", bound=PeftConfig)


class Start(NamedTuple):
    """How factors start: `fill` draws A and B in place, or `decompose` gives the initial ones that stand for a part of W,
    for the strength and the argument of its name."""

    fill: Fill | None = None
    decompose: Decompose | None = None
    argument: str = ""


class Ranked(Protocol):
    """The config of such a method; the fields of the strength are named by the method's class."""

    r: int
    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, float] | None


class LowRank(Derives, Follows, TwoFactors, Method):
    """What such methods share. A subclass states `strength`, `start` and the names of its attributes and fields."""

    pair_names: ClassVar[tuple[str, str]]  # the attributes that hold A and B
    bias_name: ClassVar[str] = ""  # … and a bias of the added term, if there can be one
    alpha_field: ClassVar[str]  # the config's field of α; s = α/r
    root_field: ClassVar[str]  # … that asks for s = α/√r
    any_factors: ClassVar[Mapping[str, object]]  # the fields of configs whose adapters are filled with given factors
    turned = False  # what follows another end stands for the transpose of this end's ΔW
    own_r: int
    first_A: Tensor | None  # the initial factors where they are subtracted; not saved
    first_B: Tensor | None

    @property
    def strength(self) -> float:
        """s, times what set_scale and scale_layer asked for."""
        raise NotImplementedError(f"{type(self).__name__}.strength")

    @property
    def start(self) -> Start:
        raise NotImplementedError(f"{type(self).__name__}.start")

    # -- tied weights -------------------------------------------------------------------------------------------------
    @classmethod
    def followers(cls, config: object, model: nn.Module, places: list[Place]) -> list[Place]:
        return followers(config, model, places)

    @classmethod
    def shared_tensors(cls, config: Ranked, sites: list[Site], rng: torch.Generator) -> dict[str, nn.Parameter]:
        def factors(site: Site) -> dict[str, nn.Parameter]:
            r, g = cls.rank_at(config, site.path), site.geometry
            return dict(zip(cls.pair_names, (site.empty(r, g.fan_in), site.empty(g.out, r)), strict=True))

        return shared_by_ends(config, sites, factors)

    def create(self, site: Site, given: Mapping[str, nn.Parameter] | None = None) -> None:
        """Make the factors, or take those of the first end, which alone writes them to the file."""
        end = end_of(site)
        self._buffers.update(first_A=None, first_B=None)
        super().create(site, end.parts)
        if end.follows:
            if end.turned:
                self.set(seen_as=self.table.turned)
            self.set(follows=True, turned=end.turned, table=self.table.of_another(*self.pair_names, repeated=True))

    # -- the start ----------------------------------------------------------------------------------------------------
    @property
    def derives(self) -> bool:
        return self.start.decompose is not None

    def derive(self, rng: torch.Generator, site: Site) -> None:
        _, decompose, argument = self.start
        if self.follows:
            why = f"ensure_weight_tying shares a pair with {site.tied}, but this start decomposes each end's own weight"
            raise refusal(type(self), site, why)
        assert decompose is not None
        a, b = self.pair_names
        first_A, first_B = decompose(self.tensor(a), self.tensor(b), rng, site, self.strength, argument)
        self.register_buffer("first_A", first_A.to(site.device, site.dtype), persistent=False)
        self.register_buffer("first_B", first_B.to(site.device, site.dtype), persistent=False)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        a, b = self.pair_names
        A, B = self.tensor(a), self.tensor(b)
        first_A, first_B = self._buffers["first_A"], self._buffers["first_B"]
        if first_A is not None and first_B is not None:
            A.copy_(first_A)
            B.copy_(first_B)
        elif not self.follows and (fill := self.start.fill) is not None:
            fill(A, B, rng, site)
        if (bias := getattr(self, self.bias_name, None)) is not None:
            bias.zero_()

    # -- the maths ----------------------------------------------------------------------------------------------------
    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) with ΔW = s·B A."""
        a, b = self.pair_names
        A, B = self.tensor(a), self.tensor(b)
        if self.turned:
            return B.T, A.T
        first_A, first_B = self._buffers["first_A"], self._buffers["first_B"]
        if first_A is None or first_B is None:
            return A, B
        return torch.cat([A, first_A]), torch.cat([B, -first_B], 1)

    def delta(self) -> tuple[Tensor, Tensor]:
        A, B = self.factors()
        return A, self.strength * B

    def fused_term(self, op: Op) -> Thin | Banks | None:
        return Thin(*self.two_factors()) if self.plain_delta else None

    def rank(self) -> int:
        return min(self.own_r * (1 if self.first_A is None else 2), self.geometry.out, self.geometry.fan_in)

    # -- as two factors -----------------------------------------------------------------------------------------------
    def two_factors(self) -> tuple[Tensor, Tensor, float]:
        return (*self.factors(), self.strength)

    @torch.no_grad()
    def set_factors(self, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
        if not self.follows:
            for name, value in zip(self.pair_names, (A, B), strict=True):
                self.tensor(name).copy_(value)
        if (own := getattr(self, self.bias_name, None)) is not None:
            own.zero_() if bias is None else own.copy_(bias)

    # -- ranks and strengths in configs -------------------------------------------------------------------------------
    @classmethod
    def rank_at(cls, config: Ranked, path: str) -> int:
        return for_path(config.rank_pattern, path, config.r, "rank_pattern")

    @classmethod
    def alpha_at(cls, config: Ranked, path: str) -> float:
        alpha: float = getattr(config, cls.alpha_field)
        return for_path(config.alpha_pattern, path, alpha, "alpha_pattern")

    @classmethod
    def config_for_ranks(cls, config: C, ranks: dict[str, int]) -> C:
        r, pattern = to_patterns(ranks)
        changes: dict[str, Any] = {"r": r, "rank_pattern": pattern, "alpha_pattern": dict(pattern), cls.alpha_field: r}
        changes |= {cls.root_field: False, **cls.any_factors}
        return replace(config, **changes)

    @classmethod
    def join(cls, config: Ranked, path: str, former: list[str]) -> None:
        root = getattr(config, cls.root_field)
        ranks, alphas = [cls.rank_at(config, p) for p in former], [cls.alpha_at(config, p) for p in former]
        if len({a / (math.sqrt(r) if root else r) for a, r in zip(alphas, ranks, strict=True)}) > 1:
            raise ValueError(f"{path} holds {', '.join(former)} at one strength, but alpha/r differs for them.")
        r = sum(ranks)
        alpha = alphas[0] * math.sqrt(r / ranks[0]) if root and len(former) > 1 else sum(alphas)
        config.rank_pattern = with_value(config.rank_pattern, path, config.r, r)
        config.alpha_pattern = with_value(config.alpha_pattern, path, getattr(config, cls.alpha_field), alpha)
