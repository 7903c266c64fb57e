"""LoKr: ΔW = s·(w1 ⊗ w2), the factors full or of low rank themselves (LyCORIS, arXiv 2309.14859).

With out = a·b and inputs = c·d: w1[a, c], w2[b, d·taps]. w2 = w2_a w2_b where r < max(b, d)/2, with `decompose_both` w1
likewise; with `use_effective_conv2d` a kernel's w2 is Tucker, core t2[r, r, *kernel]. w1 starts at 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..config_fields import among, ranged
from ..contract.site import Op, Site
from ..contract.tensors import Stored
from ..core.forms.lycoris import Lycoris, LycorisConfig
from ..maths.kron import apply_kron, factorization, kron
from ..maths.tucker import low_rank

__all__ = ["LoKrConfig", "factorization"]


@dataclass
class LoKrConfig(LycorisConfig):
    """LoKr (arXiv 2309.14859).

    decompose_both: low rank for w1, too. decompose_factor: the smaller factor of each size; -1: near the square root.
    rank_dropout_scale: the rows that rank_dropout keeps grow to make up for the others. init_weights: True (w1 = 0),
    "lycoris" (w2 = 0), False (random).
    """

    own_type = "LOKR"
    decompose_both: bool = False
    decompose_factor: int = ranged(-1, -1)
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] | None = among(True, (True, False, None, "lycoris"))


class LoKr(Lycoris):
    peft_type = "LOKR"
    config_class = LoKrConfig
    summary = "Adds a Kronecker product of two small matrices, each full or of low rank."
    formula = "W' = W + (α/r)·(w₁ ⊗ w₂)"
    paper = "arXiv 2309.14859"
    prefix = "lokr_"
    tensors = {f"lokr_{k}_weight": Stored(f"lokr_{k}") for k in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
    examples = (
        {"r": 4},
        {"r": 1, "decompose_both": True, "decompose_factor": 4, "rank_dropout": 0.1, "rank_dropout_scale": True},
        {"r": 1, "use_effective_conv2d": True, "init_weights": "lycoris"},
        {"r": 1, "alpha": 2, "use_dora": True},
    )

    config: LoKrConfig
    lokr_w1_weight: Tensor | None
    lokr_w1_a_weight: Tensor  # these two where there is no w1, and so with w2
    lokr_w1_b_weight: Tensor
    lokr_w2_weight: Tensor | None
    lokr_w2_a_weight: Tensor
    lokr_w2_b_weight: Tensor
    lokr_t2_weight: Tensor | None

    def __init__(self, config: LoKrConfig, site: Site) -> None:
        super().__init__(config, site)
        g, r = site.geometry, self.own_r
        a, b = factorization(g.out, config.decompose_factor)
        c, d = factorization(g.fan_in // g.kernel, config.decompose_factor)
        self.rescaled = config.rank_dropout_scale
        low = config.decompose_both and r < max(a, c) / 2
        first = {"lokr_w1_a_weight": (a, r), "lokr_w1_b_weight": (r, c)} if low else {"lokr_w1_weight": (a, c)}
        second = self.low_rank_shapes(2, b, d) if r < max(b, d) / 2 else {"lokr_w2_weight": (b, d, *g.shape)}
        self.make(site, {**first, **second})

    def zero_at_start(self) -> Tensor | None:
        if self.config.init_weights == "lycoris":
            return self.lokr_w2_b_weight if self.lokr_w2_weight is None else self.lokr_w2_weight
        if self.config.init_weights:
            return self.lokr_w1_a_weight if self.lokr_w1_weight is None else self.lokr_w1_weight
        return None

    def factors(self) -> tuple[Tensor, Tensor]:
        """(w1[a, c], w2[b, d·taps])."""
        w1, w2 = self.lokr_w1_weight, self.lokr_w2_weight
        return (
            low_rank(self.lokr_w1_a_weight, self.lokr_w1_b_weight) if w1 is None else w1,
            low_rank(self.lokr_w2_a_weight, self.lokr_w2_b_weight, self.lokr_t2_weight)
            if w2 is None
            else w2.flatten(1),
        )

    def delta(self) -> tuple[Tensor]:
        w1, w2 = self.factors()
        if self.lokr_w2_weight is not None and self.lokr_w2_weight.dim() == 3:
            # checkpoints of 1-d kernels mean the product in which w1 meets w2's inputs and taps, not its outputs
            # and inputs: torch.kron of a matrix with a stack of matrices, then reshaped
            return (
                self.strength * torch.kron(w1, self.lokr_w2_weight).reshape(self.geometry.out, self.geometry.fan_in),
            )
        return (kron(self.strength * w1, w2),)

    def product(self, x: Tensor, op: Op, dtype: torch.dtype) -> Tensor:
        if not op.geometry.is_matrix:
            return super().product(x, op, dtype)
        w1, w2 = self.factors()
        return apply_kron(x.to(dtype), (self.strength * w1).to(dtype), w2.to(dtype))

    def rank(self) -> int:
        first = self.lokr_w1_a_weight if self.lokr_w1_weight is None else self.lokr_w1_weight
        second = self.lokr_w2_b_weight if self.lokr_w2_weight is None else self.lokr_w2_weight.flatten(1)
        return min(min(first.shape) * min(second.shape), self.geometry.out, self.geometry.fan_in)
