"""OFT: W' = W Rᵀ, that is y = (x R) Wᵀ with R block-diagonal and orthogonal (arXiv 2306.07280, 2506.19847).

Each block is R_i = Cayley(Q_i), Q_i[b, b] skew-symmetric and filled from b(b−1)/2 trained numbers, 0 at the start.
Exact: R = (I − Q)(I + Q)⁻¹. Neumann, n terms: R = I + 2Q + 2Q² + … + Qⁿ⁻¹, which turns the other way round (Q for −Q)
and is orthogonal up to the cut-off. With kernels R acts on W's columns, with embeddings on the rows of the table.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TunerConfig
from ..config_fields import require
from ..contract.method import Method
from ..contract.refusals import refusal
from ..contract.site import Site
from ..contract.tensors import Shown, Stored
from ..maths.rotations import ball_factors, cayley, cayley_neumann, identity_like, rotate_blocks, skew_symmetric

__all__ = ["OFTConfig"]


@dataclass
class OFTConfig(TunerConfig):
    """OFT (arXiv 2306.07280).

    r: number of blocks, or oft_block_size: their size; one of the two, the other 0. A value that does not divide the
    layer's width becomes the nearest divisor. module_dropout: share of the blocks that are left out (identity) in a
    training step. coft, eps: keep every block's Q within a norm of eps/√blocks. block_share: one block for all.
    use_cayley_neumann, num_cayley_neumann_terms: the series instead of the inverse. init_weights: False starts from
    random rotations.
    """

    own_type = "OFT"
    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False  # the layer kind knows its layout; kept for checkpoints
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "r", 0)
        require(self, "oft_block_size", 0)
        require(self, "module_dropout", 0, 1)
        require(self, "eps", 0)
        require(self, "num_cayley_neumann_terms")
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ValueError(
                f"OFT takes either r (number of blocks) or oft_block_size, the other must be 0, because their product is "
                f"the layer's width; got r={self.r}, oft_block_size={self.oft_block_size}."
            )


def blocks(config: OFTConfig, width: int) -> tuple[int, int, bool]:
    """(number, size, whether the config's value had to be changed) of the blocks of a layer."""
    asked = config.r or config.oft_block_size
    found = min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: (abs(d - asked), d))
    number, size = (found, width // found) if config.r else (width // found, found)
    return number, size, found != asked


class OFT(Method):
    peft_type = "OFT"
    config_class = OFTConfig
    summary = "Rotates blocks of input channels by trained orthogonal matrices."
    formula = "W' = W Rᵀ, R = blockdiag(Cayley(Q₁), …)"
    paper = "arXiv 2306.07280"
    prefix = "oft_"
    tensors = {"oft_R": Stored("oft_R.weight", "blocks entries", indexed="oft_embedding_R.weight")}
    shown = Shown(settings=("r", "oft_block_size"))
    examples = (
        {"oft_block_size": 4},
        {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False},
        {"oft_block_size": 8, "block_share": True, "module_dropout": 0.5},
        {"oft_block_size": 4, "coft": True, "eps": 0.5},
    )

    oft_R: Tensor

    def __init__(self, config: OFTConfig, site: Site) -> None:
        super().__init__(config, site)
        width = site.geometry.width
        self.r, self.oft_block_size, changed = blocks(config, width)
        if changed:
            field, value = ("r", self.r) if config.r else ("oft_block_size", self.oft_block_size)
            warnings.warn(
                f"OFT on {site.path}: {field}={getattr(config, field)} does not divide {width}; {value} is used.",
                stacklevel=2,
            )
        b = self.oft_block_size
        self.blocks, self.entries = 1 if config.block_share else self.r, b * (b - 1) // 2
        self.create(site)
        self.identity = config.init_weights

    @classmethod
    def check(cls, config: OFTConfig, site: Site) -> None:
        super().check(config, site)
        width = site.geometry.width
        if blocks(config, width)[1] == 1:
            raise refusal(
                cls,
                site,
                f"blocks of size 1 cannot rotate, and {width} has no better divisor near what the config asks for; "
                f"choose oft_block_size among the divisors of {width}",
            )

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        self.oft_R.zero_() if self.config.init_weights else self.oft_R.normal_(0, 0.1, generator=rng)

    def constrained(self) -> Tensor:
        """The trained numbers, with `coft` pulled back to the ball of radius eps/√blocks around the identity."""
        q = self.oft_R
        if not self.config.coft:
            return q
        pull = ball_factors(q, self.config.eps / math.sqrt(q.shape[0]))
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                q.mul_(pull)  # projected gradient descent
            return q
        return q * pull

    def rotations(self) -> Tensor:
        """R [blocks, b, b]."""
        Q = skew_symmetric(self.constrained(), self.oft_block_size)
        return cayley_neumann(Q, self.config.num_cayley_neumann_terms) if self.config.use_cayley_neumann else cayley(Q)

    def before(self, x: Tensor) -> Tensor:
        R = self.rotations()
        if self.training and len(R) > 1 and (left_out := int(self.config.module_dropout * len(R))):
            kept = (torch.randperm(len(R), device=R.device) >= left_out)[:, None, None]
            R = torch.where(kept, R, identity_like(R))
        return rotate_blocks(x.to(R.dtype), R).to(x.dtype)

    def rank(self) -> int:
        return min(self.geometry.out, self.geometry.width)
