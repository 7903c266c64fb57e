"""PHM adapters: bottleneck adapters whose matrices are sums of n Kronecker products (arXiv 2106.04647, section 3).

    W = Σ_i A_i ⊗ B_i,  A[n, n, n] and B[n, out/n, in/n] of each matrix its own: 1/n of the parameters.

B of W_up starts at 0, so a fresh adapter is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config_fields import require
from ..contract.refusals import refusal
from ..contract.site import Site
from ..contract.tensors import Stored
from ..maths.kron import kronecker_sum
from .bottleneck import BESIDE_THE_MATRICES, Bottleneck, BottleneckConfig

__all__ = ["PhmConfig"]


@dataclass
class PhmConfig(BottleneckConfig):
    """PHM adapters (arXiv 2106.04647). phm_dim: n, which divides the widths; the rest as in `BottleneckConfig`.

    A bottleneck size that comes from `reduction_factor` is rounded up to a multiple of n. init_weights has no effect:
    A ~ N(0, 1/n) and B ~ N(0, 1/in), so that W_down has variance 1/in.
    """

    own_type = "PHM"
    reduction_factor: float = 32.0
    non_linearity: str = "gelu"
    phm_dim: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "phm_dim")
        if self.bottleneck_size is not None and self.bottleneck_size % self.phm_dim:
            raise ValueError(
                f"`bottleneck_size` should be a multiple of phm_dim={self.phm_dim} but the value passed is "
                f"{self.bottleneck_size}"
            )

    def size(self, width: int) -> int:
        return -(-super().size(width) // self.phm_dim) * self.phm_dim


class Phm(Bottleneck):
    peft_type = "PHM"
    config_class = PhmConfig
    summary = "A bottleneck adapter whose two matrices are sums of Kronecker products."
    formula = "y ← y + s·W_up f(W_down h), W = Σ_i A_i ⊗ B_i"
    paper = "arXiv 2106.04647"
    tensors = {
        **BESIDE_THE_MATRICES,
        **{f"adapter_{part}_{m}": Stored(f"adapter_{part}.phm_{m}") for part in ("down", "up") for m in "AB"},
    }
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"bottleneck_size": 4, "phm_dim": 2},
        {"bottleneck_size": 4, "phm_dim": 4, "variant": "parallel", "non_linearity": "relu", "scaling": 4.0},
    )

    def make(self, site: Site) -> None:
        n, b, out = self.config.phm_dim, self.size, site.geometry.out
        self.adapter_down_A, self.adapter_down_B = site.empty(n, n, n), site.empty(n, b // n, self.channels // n)
        self.adapter_up_A, self.adapter_up_B = site.empty(n, n, n), site.empty(n, out // n, b // n)

    def start(self, rng: torch.Generator) -> None:
        for A in (self.adapter_down_A, self.adapter_up_A):
            nn.init.normal_(A, std=self.config.phm_dim**-0.5, generator=rng)
        nn.init.normal_(self.adapter_down_B, std=self.channels**-0.5, generator=rng)
        nn.init.zeros_(self.adapter_up_B)

    def matrices(self) -> tuple[Tensor, Tensor]:
        down = kronecker_sum(self.adapter_down_A, self.adapter_down_B)
        return down, kronecker_sum(self.adapter_up_A, self.adapter_up_B)

    @classmethod
    def check(cls, config: Any, site: Site) -> None:
        super().check(config, site)
        n, g = config.phm_dim, site.geometry
        for what, size in (("outputs", g.out), ("inputs", g.inputs if config.variant == "parallel" else g.out)):
            if size % n:
                reason = (
                    f"a sum of A_i ⊗ B_i with {n}×{n} matrices A_i needs a multiple of {n} {what}, there are {size}"
                )
                raise refusal(cls, site, reason)
