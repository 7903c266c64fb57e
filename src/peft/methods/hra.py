"""HRA: W' = W H₁ H₂ … H_r with Householder reflections H_i = I − 2 u_i u_iᵀ/‖u_i‖², u_i[in] trained (arXiv 2405.17484).

The chain is one matrix of rank-r form, I − U T Uᵀ (compact WY): with unit columns U[in, r], T⁻¹ = I/2 + the strict upper
triangle of UᵀU. So an input row becomes x − ((x U) Tᵀ) Uᵀ: two thin products. The columns start in equal pairs, whose
reflections cancel. With `apply_GS` the columns are orthonormalised first, and the product is I − 2 Q Qᵀ.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TunerConfig
from ..config_fields import ranged
from ..contract.method import Method
from ..contract.refusals import refusal
from ..contract.site import Site
from ..contract.tensors import Shown, Stored
from ..maths.rotations import reflect, reflect_orthonormalised

__all__ = ["HRAConfig"]


@dataclass
class HRAConfig(TunerConfig):
    """HRA (arXiv 2405.17484).

    r: number of reflections; an even number lets a fresh adapter be the identity. apply_GS: orthogonalise the
    reflections' directions (Gram-Schmidt); their product is then never the identity. init_weights: False starts from
    random directions.
    """

    own_type = "HRA"
    r: int = ranged(8)
    apply_GS: bool = False
    init_weights: bool = True


class HRA(Method):
    peft_type = "HRA"
    config_class = HRAConfig
    summary = "Reflects the input of frozen weights by a chain of trained Householder reflections."
    formula = "W' = W ∏(I − 2 u_i u_iᵀ)"
    paper = "arXiv 2405.17484"
    prefix = "hra_"
    shown = Shown(layer="hra.HRA{}")
    tensors = {"hra_u_weight": Stored("hra_u", shape="width config.r")}
    examples = ({"r": 4}, {"r": 4, "apply_GS": True})

    config: HRAConfig
    hra_u_weight: Tensor

    def __init__(self, config: HRAConfig, site: Site) -> None:
        super().__init__(config, site)
        self.create(site)
        self.identity = config.init_weights and not config.apply_GS and config.r % 2 == 0

    @classmethod
    def check(cls, config: HRAConfig, site: Site) -> None:
        super().check(config, site)
        if config.apply_GS and config.r > site.geometry.width:
            reason = f"r={config.r} directions cannot be orthogonal in {site.geometry.width} dimensions"
            raise refusal(cls, site, reason)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        n, r = self.hra_u_weight.shape
        if self.config.init_weights and r % 2:
            text = f"HRA: r={r} is odd, so the reflections do not cancel and the adapter starts with an effect."
            warnings.warn(text, stacklevel=2)
        columns = r // 2 if self.identity else r
        start = (2 * torch.rand(n, columns, generator=rng) - 1) / math.sqrt(columns)
        self.hra_u_weight.copy_(start.repeat_interleave(r // columns, dim=1))

    def before(self, x: Tensor) -> Tensor:
        chain = reflect_orthonormalised if self.config.apply_GS else reflect
        return chain(x, self.hra_u_weight).to(x.dtype)

    def rank(self) -> int:
        return min(self.config.r, self.geometry.out, self.geometry.width)
