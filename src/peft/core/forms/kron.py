"""What methods of one Kronecker product share: s·(A ⊗ B) with A[a1, a2], B[b1, b2], out = a1·b1, fan_in = a2·b2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...config import TunerConfig
from ...config_fields import ranged
from ...config_values import AtLeast1
from ...contract.method import Method
from ...contract.site import Site
from ...maths.kron import factorization


@dataclass
class KroneckerConfig(TunerConfig):
    """a_shape: (a1, a2), the size of A, which must divide (out, fan_in); None takes the divisors nearest to the square
    roots. scale: s, not trained. krona_dropout: on the product's input. init_weights: True starts B at 0, False at random.
    """

    a_shape: tuple[AtLeast1, AtLeast1] | None = None
    scale: float = 1.0
    krona_dropout: float = ranged(0.0, 0, 1)
    init_weights: bool = True


class Kronecker(Method):
    """A subclass states its tensors, `pair_names` of the shapes `a1 a2` and `b1 b2`."""

    pair_names: ClassVar[tuple[str, str]]  # the attributes that hold A and B
    config: KroneckerConfig

    def __init__(self, config: KroneckerConfig, site: Site) -> None:
        super().__init__(config, site)
        (self.a1, self.b1), (self.a2, self.b2) = sizes(config, site)
        self.create(site)

    @classmethod
    def check(cls, config: KroneckerConfig, site: Site) -> None:
        super().check(config, site)
        sizes(config, site)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        """A uniform in ±1/√a2; B = 0, or like A where `init_weights` is False."""
        A, B = map(self.tensor, self.pair_names)
        for factor in (A, B):
            nn.init.uniform_(factor, -(factor.shape[1] ** -0.5), factor.shape[1] ** -0.5, generator=rng)
        if self.config.init_weights:
            nn.init.zeros_(B)

    @property
    def strength(self) -> float:
        return self.multiplier * self.config.scale

    def scaled(self) -> tuple[Tensor, Tensor]:
        """(s·A, B)."""
        A, B = map(self.tensor, self.pair_names)
        return self.strength * A, B


def sizes(config: KroneckerConfig, site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
    """((a1, b1), (a2, b2)) with out = a1·b1 and fan_in = a2·b2, or the input's channels where there is no weight."""
    out, fan_in = site.geometry.out, site.geometry.fan_in or site.geometry.inputs
    if config.a_shape is None:
        return factorization(out), factorization(fan_in)
    a1, a2 = config.a_shape
    if out % a1 or fan_in % a2:
        raise ValueError(
            f"a_shape=({a1}, {a2}) does not divide the layer {site.path or 'of this size'}, which is {out} x {fan_in}: "
            "choose divisors of both sizes, or None."
        )
    return (a1, out // a1), (a2, fan_in // a2)
