"""Compacter: PHM adapters that share the A_i and have B_i of low rank (arXiv 2106.04647).

    W = Σ_i A_i ⊗ (s_i t_i),  A[n, n, n] one for all layers and both matrices, s[n, out/n, k], t[n, k, in/n]

Compacter sits after attention and FFN, Compacter++ after FFN only. t of W_up starts at 0: the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config_fields import among, ranged
from ..contract.site import Site
from ..contract.tensors import Stored
from ..maths.kron import kronecker_sum
from .bottleneck import BESIDE_THE_MATRICES
from .phm import Phm, PhmConfig

__all__ = ["CompacterConfig"]


@dataclass
class CompacterConfig(PhmConfig):
    """Compacter (arXiv 2106.04647). variant: "compacter" or "compacter++". phm_dim: n. phm_rank: k, the rank of B_i.

    The rest as in `BottleneckConfig`.
    """

    roles: ClassVar[dict[str, str]] = {"compacter": "attention_and_mlps", "compacter++": "mlps"}

    own_type = "COMPACTER"
    variant: str = among("compacter", roles)
    phm_rank: int = ranged(1)


class Compacter(Phm):
    peft_type = "COMPACTER"
    config_class = CompacterConfig
    summary = "A bottleneck adapter of Kronecker products whose left factors are shared by all layers."
    formula = "y ← y + s·W_up f(W_down y), W = Σ_i A_i ⊗ (s_i t_iᵀ), A shared"
    paper = "arXiv 2106.04647"
    tensors = {
        **BESIDE_THE_MATRICES,
        "adapter_down_s": Stored("adapter_down.phm_s", "n size_n config.phm_rank"),
        "adapter_down_t": Stored("adapter_down.phm_t", "n config.phm_rank channels_n"),
        "adapter_up_s": Stored("adapter_up.phm_s", "n out_n config.phm_rank"),
        "adapter_up_t": Stored("adapter_up.phm_t", "n config.phm_rank size_n"),
        "adapter_phm_rule": Stored(shape="n n n", shared=True),
    }
    examples = (
        {"bottleneck_size": 4, "phm_dim": 2},
        {"bottleneck_size": 4, "phm_dim": 4, "variant": "compacter++", "phm_rank": 2, "scaling": "learned"},
    )

    @classmethod
    def shared_tensors(
        cls, config: CompacterConfig, sites: list[Site], rng: torch.Generator
    ) -> dict[str, nn.Parameter]:
        n = config.phm_dim
        rule = sites[0].empty(n, n, n)
        if not rule.is_meta:
            nn.init.normal_(rule, std=n**-0.5, generator=rng)
        return {"adapter_phm_rule": rule}

    def start(self, rng: torch.Generator) -> None:
        """s and t alike, so that W_down has variance 1/in."""
        rank = self.config.phm_rank
        for name, inputs in (("down_s", self.channels), ("down_t", self.channels), ("up_s", self.size)):
            nn.init.normal_(self.tensor(f"adapter_{name}"), std=(inputs * rank) ** -0.25, generator=rng)
        nn.init.zeros_(self.tensor("adapter_up_t"))

    def matrices(self) -> tuple[Tensor, Tensor]:
        A = self.tensor("adapter_phm_rule")
        down, up = ([self.tensor(f"adapter_{part}_{m}") for m in "st"] for part in ("down", "up"))
        return kronecker_sum(A, down[0] @ down[1]), kronecker_sum(A, up[0] @ up[1])
