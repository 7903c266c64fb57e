"""LoHa: ΔW = s·(w1_a w1_b) ⊙ (w2_a w2_b), a Hadamard product of rank up to r² (FedPara, arXiv 2108.06098).

w_a[out, r], w_b[r, fan_in]. With `use_effective_conv2d` a kernel's factor is Tucker: core t[r, r, *kernel] between
w_a[r, out] and w_b[r, inputs]. w2_b starts at 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..contract.site import Site
from ..contract.tensors import Stored
from ..core.forms.lycoris import Lycoris, LycorisConfig
from ..maths.tucker import low_rank

__all__ = ["LoHaConfig"]


@dataclass
class LoHaConfig(LycorisConfig):
    """LoHa (arXiv 2108.06098)."""

    own_type = "LOHA"
    init_weights: bool = True


class LoHa(Lycoris):
    peft_type = "LOHA"
    config_class = LoHaConfig
    summary = "Adds the entrywise product of two low-rank matrices: rank r² for the parameters of 2r."
    formula = "W' = W + (α/r)·(B₁A₁) ⊙ (B₂A₂)"
    paper = "arXiv 2108.06098"
    prefix = "hada_"
    tensors = {f"hada_{k}_weight": Stored(f"hada_{k}") for k in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
    examples = (
        {"r": 4},
        {"r": 2, "use_effective_conv2d": True, "rank_dropout": 0.1},
        {"r": 2, "alpha": 4, "use_dora": True},
    )

    config: LoHaConfig
    hada_w1_a_weight: Tensor
    hada_w1_b_weight: Tensor
    hada_w2_a_weight: Tensor
    hada_w2_b_weight: Tensor
    hada_t1_weight: Tensor | None
    hada_t2_weight: Tensor | None

    def __init__(self, config: LoHaConfig, site: Site) -> None:
        super().__init__(config, site)
        out, inputs = site.geometry.out, site.geometry.fan_in // site.geometry.kernel
        self.make(site, {**self.low_rank_shapes(1, out, inputs), **self.low_rank_shapes(2, out, inputs)})

    def zero_at_start(self) -> Tensor | None:
        return self.hada_w2_b_weight if self.config.init_weights else None

    def delta(self) -> tuple[Tensor]:
        first = low_rank(self.hada_w1_a_weight, self.hada_w1_b_weight, self.hada_t1_weight)
        second = low_rank(self.hada_w2_a_weight, self.hada_w2_b_weight, self.hada_t2_weight)
        return (self.strength * first * second,)

    def rank(self) -> int:
        g = self.geometry
        per = self.own_r * g.kernel if self.tucker else self.own_r
        return min(per * per, g.out, g.fan_in)
