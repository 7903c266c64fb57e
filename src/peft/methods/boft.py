"""BOFT: W' = s ⊙ (W Bᵀ) with B = B_m … B_1 B_0 a product of sparse orthogonal butterfly factors (arXiv 2311.06243).

B_i = P_i blockdiag(Cayley(A_i)) P_iᵀ: each factor mixes channels that lie further apart, P_i being the permutation that
brings them together, and A = (R − Rᵀ)/2 for the trained R[m, blocks, b, b]; Cayley(A) = (I − A)(I + A)⁻¹. s[out] scales
the output channels. R = 0 and s = 1 at the start.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..config_fields import ranged
from ..contract.site import Op
from ..contract.tensors import Shown, Stored
from ..core.forms.rotation import BlockRotation, BlockRotationConfig
from ..maths.rotations import butterfly, cayley

__all__ = ["BOFTConfig"]


@dataclass
class BOFTConfig(BlockRotationConfig):
    """BOFT (arXiv 2311.06243).

    boft_block_size, or boft_block_num: size or number of the blocks, the other 0. boft_n_butterfly_factor: number of
    factors; 1 is block-diagonal. boft_dropout: share of one factor's blocks left out (identity) in a training step.
    init_weights: False starts from random rotations and scales.
    """

    own_type = "BOFT"
    block_fields = ("boft_block_num", "boft_block_size")
    boft_block_size: int = ranged(4, 0)
    boft_block_num: int = ranged(0, 0)
    boft_n_butterfly_factor: int = ranged(1)
    boft_dropout: float = ranged(0.0, 0, 1)

    def blocks(self, width: int) -> tuple[int, int]:
        size = self.boft_block_size or width // self.boft_block_num
        return width // size, size

    def misfit(self, width: int) -> str:
        value = getattr(self, self.stated)
        if width % value:
            return f"its input width {width} must be divisible by {self.stated} ({value})"
        number, size = self.blocks(width)
        if size == 1:
            return "blocks of size 1 cannot rotate: choose larger blocks"
        factors = self.boft_n_butterfly_factor
        furthest = 2 ** (factors - 1)
        if furthest > 1 and (size % 2 or number % furthest):
            return (
                f"{factors} butterfly factors need an even block size (here {size}) and a number of blocks (here {number}) "
                f"that {furthest} divides"
            )
        return ""


class BOFT(BlockRotation):
    peft_type = "BOFT"
    config_class = BOFTConfig
    summary = "Rotates all input channels by a product of trained sparse butterfly factors, and scales the outputs."
    formula = "W' = s ⊙ (W Bᵀ), B = ∏ P_i blockdiag(Cayley(R_i)) P_iᵀ"
    paper = "arXiv 2311.06243"
    prefix = "boft_"
    tensors = {
        # where upstream finds no CUDA compiler it trains and saves one factor, whatever the config asks for
        "boft_R_weight": Stored("boft_R", shape="config.boft_n_butterfly_factor number size size", shrinks=0),
        "boft_s_weight": Stored("boft_s", shape="out", disk="-1 1", kernel="1 -1"),
    }
    starts = {"boft_R_weight": 0, "boft_s_weight": 1}
    shown = Shown(
        settings=("boft_block_size", "boft_block_num"),
        paths={"boft_block_size": "size", "boft_block_num": "number"},
    )
    examples = (
        {"boft_block_size": 4},
        {"boft_block_size": 2, "boft_n_butterfly_factor": 2, "boft_dropout": 0.5},
        {"boft_block_size": 0, "boft_block_num": 2},
    )

    config: BOFTConfig
    boft_R_weight: Tensor
    boft_s_weight: Tensor

    def rotations(self) -> Tensor:
        """The blocks of every factor, [m, blocks, b, b]."""
        R = self.boft_R_weight
        return self.with_dropout(cayley((R - R.transpose(-1, -2)) / 2), self.config.boft_dropout)

    def rotate(self, rows: Tensor) -> Tensor:
        """rows Bᵀ for rows[..., width], factor by factor."""
        return butterfly(rows, self.rotations()).to(rows.dtype)

    def weight(self, W: Tensor) -> Tensor:
        turned = self.rotate(W.T).T if self.geometry.indexed else self.rotate(W)
        return self.boft_s_weight.to(W.dtype)[:, None] * turned

    def add(self, x: Tensor, y: Tensor, op: Op) -> Tensor:
        if not op.geometry.indexed:
            return super().add(x, y, op)
        base = op(x, op.read())  # the looked-up rows, not the whole table
        return y + (self.boft_s_weight.to(y.dtype) * self.rotate(base) - base).to(y.dtype)
