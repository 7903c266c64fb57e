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

from ..config_fields import ranged
from ..contract.site import Site
from ..contract.tensors import Shown, Stored
from ..core.forms.rotation import BlockRotation, BlockRotationConfig
from ..maths.rotations import ball_factors, cayley, cayley_neumann, nearest_divisor, rotate_blocks, skew_symmetric

__all__ = ["OFTConfig"]


@dataclass
class OFTConfig(BlockRotationConfig):
    """OFT (arXiv 2306.07280).

    r: number of blocks, or oft_block_size: their size; one of the two, the other 0. A value that does not divide the
    layer's width becomes the nearest divisor. module_dropout: share of the blocks that are left out (identity) in a
    training step. coft, eps: keep every block's Q within a norm of eps/√blocks. block_share: one block for all.
    use_cayley_neumann, num_cayley_neumann_terms: the series instead of the inverse. init_weights: False starts from
    random rotations.
    """

    own_type = "OFT"
    block_fields = ("r", "oft_block_size")
    r: int = ranged(0, 0)
    oft_block_size: int = ranged(32, 0)
    module_dropout: float = ranged(0.0, 0, 1)
    coft: bool = False
    eps: float = ranged(6e-5, 0)
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = ranged(5)

    def blocks(self, width: int) -> tuple[int, int]:
        found = nearest_divisor(width, getattr(self, self.stated))
        return (found, width // found) if self.r else (width // found, found)

    def misfit(self, width: int) -> str:
        reason = (
            f"blocks of size 1 cannot rotate, and {width} has no better divisor near what the config asks for; "
            f"choose oft_block_size among the divisors of {width}"
        )
        return reason if self.blocks(width)[1] == 1 else ""


class OFT(BlockRotation):
    peft_type = "OFT"
    config_class = OFTConfig
    summary = "Rotates blocks of input channels by trained orthogonal matrices."
    formula = "W' = W Rᵀ, R = blockdiag(Cayley(Q₁), …)"
    paper = "arXiv 2306.07280"
    prefix = "oft_"
    tensors = {"oft_R_weight": Stored("oft_R.weight", "trained entries", indexed="oft_embedding_R.weight")}
    starts = {"oft_R_weight": 0}
    shown = Shown(settings=("r", "oft_block_size"), paths={"r": "number", "oft_block_size": "size"})
    examples = (
        {"oft_block_size": 4},
        {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False},
        {"oft_block_size": 8, "block_share": True, "module_dropout": 0.5},
        {"oft_block_size": 4, "coft": True, "eps": 0.5},
    )

    config: OFTConfig
    oft_R_weight: Tensor

    def __init__(self, config: OFTConfig, site: Site) -> None:
        super().__init__(config, site)
        asked, used = getattr(config, config.stated), getattr(self, self.shown.paths[config.stated])
        if asked != used:
            text = f"{config.stated}={asked} does not divide {site.geometry.width}; {used} is used."
            warnings.warn(f"OFT on {site.path}: {text}", stacklevel=2)

    @property
    def trained(self) -> int:
        """The number of blocks that have values of their own."""
        return 1 if self.config.block_share else self.number

    @property
    def entries(self) -> int:
        return self.size * (self.size - 1) // 2

    def constrained(self) -> Tensor:
        """The trained numbers, with `coft` pulled back to the ball of radius eps/√blocks around the identity."""
        q = self.oft_R_weight
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
        Q = skew_symmetric(self.constrained(), self.size)
        return cayley_neumann(Q, self.config.num_cayley_neumann_terms) if self.config.use_cayley_neumann else cayley(Q)

    def before(self, x: Tensor) -> Tensor:
        R = self.with_dropout(self.rotations(), self.config.module_dropout)
        return rotate_blocks(x, R).to(x.dtype)
