"""What LoHa and LoKr share (LyCORIS, arXiv 2309.14859): strength α/r, patterns, and dropout of ΔW itself.

rank_dropout drops rows of ΔW, module_dropout the whole of it; both act on ΔW x in training and leave merging alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ...config import DeltaConfig, as_bias
from ...config_fields import ranged, reading
from ...config_values import AtLeast1
from ...contract.method import Method
from ...contract.site import Op, Site
from ...contract.tensors import Shown
from ..anatomy.patterns import for_path

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


@dataclass
class LycorisConfig(DeltaConfig):
    """r, alpha: rank and strength, s = alpha / r. rank_pattern, alpha_pattern: name or regex -> value, overriding them.

    rank_dropout: share of ΔW's rows left out per training step. module_dropout: how often ΔW is left out as a whole.
    use_effective_conv2d: a kernel's taps get a Tucker core (t[r, r, *kernel]) instead of columns (FedPara, prop. 3).
    init_weights: True starts at the identity, False with random factors.
    """

    rank_pattern: dict[str, AtLeast1] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    r: int = ranged(8)
    alpha: float = 8
    rank_dropout: float = ranged(0.0, 0, 1)
    module_dropout: float = ranged(0.0, 0, 1)
    use_effective_conv2d: bool = False
    init_weights: bool | str | None = True
    bias: str = reading(as_bias, "none", own=True)

    def __post_init__(self) -> None:
        super().__post_init__()


class Lycoris(Method):
    """The part of LoHa and LoKr that is not the formula of ΔW."""

    shown = Shown(
        settings=("r", "alpha", "scaling", "rank_dropout", "module_dropout"),
        paths={
            **{"r": "own_r", "alpha": "own_alpha", "scaling": "strength"},
            **{"rank_dropout": "drop_rows", "module_dropout": "drop_all"},
        },
        assignable=("alpha", "rank_dropout", "module_dropout"),
    )
    rescaled = True  # the rows that rank_dropout keeps grow to make up for the others

    config: LycorisConfig

    def __init__(self, config: LycorisConfig, site: Site) -> None:
        super().__init__(config, site)
        self.own_r: int = for_path(config.rank_pattern, site.path, config.r, "rank_pattern")
        self.own_alpha = for_path(config.alpha_pattern, site.path, config.alpha, "alpha_pattern")
        self.drop_rows, self.drop_all = config.rank_dropout, config.module_dropout
        self.tucker = config.use_effective_conv2d and self.geometry.kernel > 1

    def low_rank_shapes(self, n: int, rows: int, inputs: int) -> Shapes:
        """The factors of the n-th matrix [rows, inputs·taps]; Tucker cores have at least two kernel sizes in the files."""
        g, r, name = self.geometry, self.own_r, f"{self.prefix}w{n}"
        if not self.tucker:
            return {f"{name}_a_weight": (rows, r), f"{name}_b_weight": (r, inputs * g.kernel)}
        core = (r, r, *g.shape, *([1] if len(g.shape) == 1 else []))
        return {f"{name}_a_weight": (r, rows), f"{name}_b_weight": (r, inputs), f"{self.prefix}t{n}_weight": core}

    def make(self, site: Site, shapes: Shapes) -> None:
        """The tensors of these shapes; the table's others are None."""
        for name in (*shapes, *(n for n in self.tensors if n not in shapes)):
            self.register_parameter(name, site.empty(*shapes[name]) if name in shapes else None)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        """Uniform in ±1/√fan_in, but for what is zero at the start."""
        for p in self.parameters():
            kaiming(p, rng)
        if (zero := self.zero_at_start()) is not None:
            nn.init.zeros_(zero)

    def zero_at_start(self) -> Tensor | None:
        """The factor that lets a fresh adapter be the identity, where the config wants that."""
        raise NotImplementedError(f"{type(self).__name__}.zero_at_start")

    @property
    def strength(self) -> float:
        return self.multiplier * self.own_alpha / self.own_r

    def term(self, x: Tensor, op: Op, dtype: torch.dtype) -> Tensor:
        y = self.product(x, op, dtype)
        kept = self.kept(y)
        return y if kept is None else op.scale(y, kept)

    def product(self, x: Tensor, op: Op, dtype: torch.dtype) -> Tensor:
        """ΔW x."""
        return super().term(x, op, dtype)

    def kept(self, like: Tensor) -> Tensor | None:
        """The factor [out] that both dropouts put on the rows of ΔW x in a training step."""
        if not self.training or not (self.drop_rows or self.drop_all):
            return None
        out = self.geometry.out
        kept = (torch.rand(out, device=like.device) > self.drop_rows).to(like.dtype)
        if self.drop_rows and self.rescaled:
            kept = kept / kept.mean().clamp(min=1 / out)
        return kept * (torch.rand(1, device=like.device) > self.drop_all)


def kaiming(tensor: Tensor, rng: torch.Generator) -> None:
    """Uniform in ±1/√fan_in."""
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=rng)
