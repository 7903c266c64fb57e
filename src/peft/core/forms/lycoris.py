"""What LoHa and LoKr share (LyCORIS, arXiv 2309.14859): strength α/r, patterns, and dropout of ΔW itself.

rank_dropout drops rows of ΔW, module_dropout the whole of it; both act on ΔW x in training and leave merging alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...config import DeltaConfig, require_ranks
from ...config_fields import own_field, require
from ...contract.method import Method
from ...contract.site import Op, Site
from ...contract.tensors import Shown
from ..anatomy.patterns import for_path


@dataclass
class LycorisConfig(DeltaConfig):
    """r, alpha: rank and strength, s = alpha / r. rank_pattern, alpha_pattern: name or regex -> value, overriding them.

    rank_dropout: share of ΔW's rows left out per training step. module_dropout: how often ΔW is left out as a whole.
    use_effective_conv2d: a kernel's taps get a Tucker core (t[r, r, *kernel]) instead of columns (FedPara, prop. 3).
    init_weights: True starts at the identity, False with random factors.
    """

    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool | str = True
    bias: str = own_field("none")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "r")
        require(self, "rank_dropout", 0, 1)
        require(self, "module_dropout", 0, 1)
        require_ranks(self)


class Lycoris(Method):
    """The part of LoHa and LoKr that is not the formula of ΔW."""

    shown = Shown(
        settings=("r", "alpha", "scaling", "rank_dropout", "module_dropout"),
        assignable=("alpha", "rank_dropout", "module_dropout"),
    )
    rescaled = True  # the rows that rank_dropout keeps grow to make up for the others

    def __init__(self, config: Any, site: Site) -> None:
        super().__init__(config, site)
        self.r: int = for_path(config.rank_pattern, site.path, config.r)
        self.alpha = for_path(config.alpha_pattern, site.path, config.alpha)
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout
        self.tucker = config.use_effective_conv2d and self.geometry.kernel > 1

    @property
    def core_shape(self) -> tuple[int, ...]:
        """The kernel sizes as Tucker cores hold them: at least two, as the files have it."""
        shape = self.geometry.shape
        return shape if len(shape) > 1 else (*shape, 1)

    @property
    def scaling(self) -> float:
        return self.multiplier * self.alpha / self.r

    def term(self, x: Tensor, op: Op, dtype: torch.dtype) -> Tensor:
        y = self.product(x, op, dtype)
        kept = self.kept(y)
        return y if kept is None else op.scale(y, kept)

    def product(self, x: Tensor, op: Op, dtype: torch.dtype) -> Tensor:
        """ΔW x."""
        return super().term(x, op, dtype)

    def kept(self, like: Tensor) -> Tensor | None:
        """The factor [out] that both dropouts put on the rows of ΔW x in a training step."""
        if not self.training or not (self.rank_dropout or self.module_dropout):
            return None
        out = self.geometry.out
        kept = (torch.rand(out, device=like.device) > self.rank_dropout).to(like.dtype)
        if self.rank_dropout and self.rescaled:
            kept = kept / kept.mean().clamp(min=1 / out)
        return kept * (torch.rand(1, device=like.device) > self.module_dropout)


def kaiming(tensor: Tensor, rng: torch.Generator) -> None:
    """Uniform in ±1/√fan_in."""
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=rng)
