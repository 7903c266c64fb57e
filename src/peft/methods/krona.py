"""KronA: ΔW = s·(A ⊗ B) with A[a1, a2], B[b1, b2], out = a1·b1, fan_in = a2·b2 (arXiv 2212.10650).

Both factors are full, so ΔW can have any rank; x is multiplied without forming A ⊗ B. B starts at 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import DeltaConfig
from ..config_fields import require
from ..contract.method import Method
from ..contract.site import Op, Site
from ..contract.tensors import Shown, Stored
from ..maths.kron import apply_kron, factorization, kron

__all__ = ["KronAConfig"]


@dataclass
class KronAConfig(DeltaConfig):
    """KronA (arXiv 2212.10650).

    a_shape: (a1, a2), the size of A, which must divide (out, fan_in); None takes the divisors nearest to the square
    roots. scale: s, not trained. krona_dropout: on the input. init_weights: True starts B at 0, False both at random.
    """

    own_type = "KRONA"
    a_shape: tuple[int, int] | list[int] | None = None
    scale: float = 1.0
    krona_dropout: float = 0.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shape(self)


class KronA(Method):
    peft_type = "KRONA"
    config_class = KronAConfig
    summary = "Adds a scaled Kronecker product of two full matrices: few parameters, any rank."
    formula = "W' = W + s·(A ⊗ B)"
    paper = "arXiv 2212.10650"
    prefix = "krona_"
    tensors = {"krona_A": Stored(shape="a1 a2"), "krona_B": Stored(shape="b1 b2")}
    shown = Shown(settings=("scaling",), dropout="krona_dropout")
    examples = ({}, {"a_shape": (4, 2), "scale": 2.0, "krona_dropout": 0.1}, {"use_dora": True})

    def __init__(self, config: KronAConfig, site: Site) -> None:
        super().__init__(config, site)
        (self.a1, self.b1), (self.a2, self.b2) = sizes(config, site.geometry.out, site.geometry.fan_in, site.path)
        self.dropout = config.krona_dropout
        self.create(site)

    @classmethod
    def check(cls, config: KronAConfig, site: Site) -> None:
        super().check(config, site)
        sizes(config, site.geometry.out, site.geometry.fan_in, site.path)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        start(self.krona_A, self.krona_B, self.config, rng)

    @property
    def scaling(self) -> float:
        return self.multiplier * self.config.scale

    def delta(self) -> tuple[Tensor]:
        return (kron(self.scaling * self.krona_A, self.krona_B),)

    def term(self, x: Tensor, op: Op, dtype: torch.dtype) -> Tensor:
        if not op.geometry.is_matrix:
            return super().term(x, op, dtype)
        return apply_kron(x.to(dtype), (self.scaling * self.krona_A).to(dtype), self.krona_B.to(dtype))

    def rank(self) -> int:
        return min(self.krona_A.shape) * min(self.krona_B.shape)


def check_shape(config: Any) -> None:
    """The fields that the Kronecker methods share."""
    require(config, "krona_dropout", 0, 1)
    shape = config.a_shape
    if shape is not None and (len(shape) != 2 or any(not isinstance(n, int) or n < 1 for n in shape)):
        raise ValueError(f"a_shape={shape!r}: expected two positive numbers, the rows and columns of A, or None.")


def sizes(config: Any, out: int, inputs: int, path: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """((a1, b1), (a2, b2)) with out = a1·b1 and inputs = a2·b2."""
    if config.a_shape is None:
        return factorization(out), factorization(inputs)
    a1, a2 = config.a_shape
    if out % a1 or inputs % a2:
        raise ValueError(
            f"a_shape=({a1}, {a2}) does not divide the layer {path or 'of this size'}, which is {out} x {inputs}: "
            "choose divisors of both sizes, or None."
        )
    return (a1, out // a1), (a2, inputs // a2)


def start(A: Tensor, B: Tensor, config: Any, rng: torch.Generator) -> None:
    """A uniform in ±1/√a2; B = 0, or like A where `init_weights` is False."""
    for factor in (A, B):
        nn.init.uniform_(factor, -(factor.shape[1] ** -0.5), factor.shape[1] ** -0.5, generator=rng)
    if config.init_weights:
        nn.init.zeros_(B)
