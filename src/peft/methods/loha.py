"""LoHa: ΔW = s·(w1_a w1_b) ⊙ (w2_a w2_b), a Hadamard product of rank up to r² (FedPara, arXiv 2108.06098).

w_a[out, r], w_b[r, fan_in]. With `use_effective_conv2d` a kernel's factor is Tucker: core t[r, r, *kernel] between
w_a[r, out] and w_b[r, inputs]. w2_b starts at 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..contract.site import Site
from ..contract.tensors import Stored
from ..core.forms.lycoris import Lycoris, LycorisConfig, kaiming
from ..maths.tucker import tucker

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
    tensors = dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), Stored())
    examples = (
        {"r": 4},
        {"r": 2, "use_effective_conv2d": True, "rank_dropout": 0.1},
        {"r": 2, "alpha": 4, "use_dora": True},
    )

    def __init__(self, config: LoHaConfig, site: Site) -> None:
        super().__init__(config, site)
        g, r = site.geometry, self.r
        for n in (1, 2):
            if self.tucker:
                core = site.empty(r, r, *self.core_shape)
                a, b = site.empty(r, g.out), site.empty(r, g.fan_in // g.kernel)
            else:
                core, a, b = None, site.empty(g.out, r), site.empty(r, g.fan_in)
            for name, value in ((f"hada_w{n}_a", a), (f"hada_w{n}_b", b), (f"hada_t{n}", core)):
                self.register_parameter(name, value)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        for p in self.parameters():
            kaiming(p, rng)
        if self.config.init_weights:
            nn.init.zeros_(self.hada_w2_b)

    def delta(self) -> tuple[Tensor]:
        if self.tucker:
            first = tucker(self.hada_t1, self.hada_w1_a, self.hada_w1_b)
            second = tucker(self.hada_t2, self.hada_w2_a, self.hada_w2_b)
        else:
            first, second = self.hada_w1_a @ self.hada_w1_b, self.hada_w2_a @ self.hada_w2_b
        return (self.scaling * first * second,)

    def rank(self) -> int:
        g = self.geometry
        per = self.r * g.kernel if self.tucker else self.r
        return min(per * per, g.out, g.fan_in)
