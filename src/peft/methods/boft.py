"""BOFT: W' = s ⊙ (W Bᵀ) with B = B_m … B_1 B_0 a product of sparse orthogonal butterfly factors (arXiv 2311.06243).

B_i = P_i blockdiag(Cayley(A_i)) P_iᵀ: each factor mixes channels that lie further apart, P_i being the permutation that
brings them together, and A = (R − Rᵀ)/2 for the trained R[m, blocks, b, b]; Cayley(A) = (I − A)(I + A)⁻¹. s[out] scales
the output channels. R = 0 and s = 1 at the start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TunerConfig
from ..config_fields import require
from ..contract.method import Method
from ..contract.refusals import refusal
from ..contract.site import Op, Site
from ..contract.tensors import Shown, Stored
from ..maths.rotations import butterfly, cayley, identity_like

__all__ = ["BOFTConfig"]


@dataclass
class BOFTConfig(TunerConfig):
    """BOFT (arXiv 2311.06243).

    boft_block_size, or boft_block_num: size or number of the blocks, the other 0. boft_n_butterfly_factor: number of
    factors; 1 is block-diagonal. boft_dropout: share of one factor's blocks left out (identity) in a training step.
    init_weights: False starts from random rotations and scales.
    """

    own_type = "BOFT"
    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False  # the layer kind knows its layout; kept for checkpoints
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "boft_block_size", 0)
        require(self, "boft_block_num", 0)
        require(self, "boft_n_butterfly_factor")
        require(self, "boft_dropout", 0, 1)
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            raise ValueError(
                "BOFT takes either boft_block_size or boft_block_num, the other must be 0, because their product is the "
                f"layer's width; got {self.boft_block_size} and {self.boft_block_num}."
            )


class BOFT(Method):
    peft_type = "BOFT"
    config_class = BOFTConfig
    summary = "Rotates all input channels by a product of trained sparse butterfly factors, and scales the outputs."
    formula = "W' = s ⊙ (W Bᵀ), B = ∏ P_i blockdiag(Cayley(R_i)) P_iᵀ"
    paper = "arXiv 2311.06243"
    prefix = "boft_"
    tensors = {
        # where upstream finds no CUDA compiler it trains and saves one factor, whatever the config asks for
        "boft_R": Stored(
            shape="config.boft_n_butterfly_factor boft_block_num boft_block_size boft_block_size", shrinks=0
        ),
        "boft_s": Stored(shape="out", disk="-1 1", kernel="1 -1"),
    }
    shown = Shown(settings=("boft_block_size", "boft_block_num"))
    examples = (
        {"boft_block_size": 4},
        {"boft_block_size": 2, "boft_n_butterfly_factor": 2, "boft_dropout": 0.5},
        {"boft_block_size": 0, "boft_block_num": 2},
    )

    def __init__(self, config: BOFTConfig, site: Site) -> None:
        super().__init__(config, site)
        width = site.geometry.width
        self.boft_block_size: int = config.boft_block_size or width // config.boft_block_num
        self.boft_block_num = width // self.boft_block_size
        self.create(site)
        self.identity = config.init_weights

    @classmethod
    def check(cls, config: BOFTConfig, site: Site) -> None:
        super().check(config, site)
        width = site.geometry.width
        field = "boft_block_size" if config.boft_block_size else "boft_block_num"
        value = getattr(config, field)
        if width % value:
            raise refusal(cls, site, f"its input width {width} must be divisible by {field} ({value})")
        b = config.boft_block_size or width // config.boft_block_num
        furthest = 2 ** (config.boft_n_butterfly_factor - 1)
        if b == 1:
            raise refusal(cls, site, "blocks of size 1 cannot rotate: choose larger blocks")
        if furthest > 1 and (b % 2 or (width // b) % furthest):
            raise refusal(
                cls,
                site,
                f"{config.boft_n_butterfly_factor} butterfly factors need an even block size (here {b}) and a number of "
                f"blocks (here {width // b}) that {furthest} divides",
            )

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        if self.config.init_weights:
            self.boft_R.zero_()
            self.boft_s.fill_(1)
        else:
            self.boft_R.normal_(0, 0.1, generator=rng)
            self.boft_s.normal_(1, 0.1, generator=rng)

    def rotations(self) -> Tensor:
        """The blocks of every factor, [m, blocks, b, b]."""
        R = self.boft_R
        Q = cayley((R - R.mT) / 2)
        if self.training and (left_out := int(self.config.boft_dropout * R.shape[1])):
            kept = (torch.randperm(R.shape[1], device=R.device) >= left_out)[:, None, None]
            factor = torch.randint(len(R), (1,), device=R.device)
            other = torch.arange(len(R), device=R.device)[:, None, None, None] != factor
            Q = torch.where(kept | other, Q, identity_like(Q))
        return Q

    def rotate(self, rows: Tensor) -> Tensor:
        """rows Bᵀ for rows[..., width], factor by factor."""
        return butterfly(rows, self.rotations().to(rows.dtype))

    def weight(self, W: Tensor) -> Tensor:
        turned = self.rotate(W.T).T if self.geometry.indexed else self.rotate(W)
        return self.boft_s.to(W.dtype)[:, None] * turned

    def add(self, x: Tensor, y: Tensor, op: Op) -> Tensor:
        if not op.geometry.indexed:
            return super().add(x, y, op)
        base = op(x, op.read())  # the looked-up rows, not the whole table
        return y + (self.boft_s.to(y.dtype) * self.rotate(base) - base).to(y.dtype)

    def rank(self) -> int:
        return min(self.geometry.out, self.geometry.width)
