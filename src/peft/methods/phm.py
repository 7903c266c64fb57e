"""PHM adapters: bottleneck adapters whose matrices are sums of n Kronecker products (arXiv 2106.04647, section 3).

    W = Σ_i A_i ⊗ B_i,  A[n, n, n] and B[n, out/n, in/n] of each matrix its own: 1/n of the parameters.

B of W_up starts at 0, so a fresh adapter is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config_fields import among, ranged
from ..contract.refusals import refusal
from ..contract.site import Site
from ..contract.tensors import Stored
from ..maths.kron import kronecker_sum
from ..maths.networks import ACTIVATIONS
from .bottleneck import BESIDE_THE_MATRICES, Bottleneck, BottleneckConfig

__all__ = ["PhmConfig"]


@dataclass
class PhmConfig(BottleneckConfig):
    """PHM adapters (arXiv 2106.04647). phm_dim: n, which divides the widths; the rest as in `BottleneckConfig`.

    A bottleneck size that comes from `reduction_factor` is rounded up to a multiple of n. init_weights has no effect:
    A ~ N(0, 1/n) and B ~ N(0, 1/in), so that W_down has variance 1/in.
    """

    own_type = "PHM"
    reduction_factor: float = ranged(32.0, 1e-6)
    non_linearity: str = among("gelu", ACTIVATIONS)
    phm_dim: int = ranged(4)

    def __post_init__(self) -> None:
        super().__post_init__()
        n, b = self.phm_dim, self.bottleneck_size
        if b is not None and b % n:
            raise ValueError(f"`bottleneck_size` should be a multiple of phm_dim={n} but the value passed is {b}")

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
        "adapter_down_A": Stored("adapter_down.phm_A", "n n n"),
        "adapter_down_B": Stored("adapter_down.phm_B", "n size_n channels_n"),
        "adapter_up_A": Stored("adapter_up.phm_A", "n n n"),
        "adapter_up_B": Stored("adapter_up.phm_B", "n out_n size_n"),
    }
    examples = (
        {"bottleneck_size": 4, "phm_dim": 2},
        {"bottleneck_size": 4, "phm_dim": 4, "variant": "parallel", "non_linearity": "relu", "scaling": 4.0},
    )

    def create(self, site: Site, given: Mapping[str, nn.Parameter] | None = None) -> None:
        n = self.config.phm_dim
        self.set(n=n, size_n=self.size // n, channels_n=self.channels // n, out_n=site.geometry.out // n)
        super().create(site, given)

    def start(self, rng: torch.Generator) -> None:
        for part in ("down", "up"):
            nn.init.normal_(self.tensor(f"adapter_{part}_A"), std=self.config.phm_dim**-0.5, generator=rng)
        nn.init.normal_(self.tensor("adapter_down_B"), std=self.channels**-0.5, generator=rng)
        nn.init.zeros_(self.tensor("adapter_up_B"))

    def matrices(self) -> tuple[Tensor, Tensor]:
        down, up = ([self.tensor(f"adapter_{part}_{m}") for m in "AB"] for part in ("down", "up"))
        return kronecker_sum(*down), kronecker_sum(*up)

    @classmethod
    def check(cls, config: PhmConfig, site: Site) -> None:
        super().check(config, site)
        n, g = config.phm_dim, site.geometry
        for what, size in (("outputs", g.out), ("inputs", g.inputs if config.parallel else g.out)):
            if size % n:
                needed = f"a multiple of {n} {what}, there are {size}"
                raise refusal(cls, site, f"a sum of A_i ⊗ B_i with {n}×{n} matrices A_i needs {needed}")
