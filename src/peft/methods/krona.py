"""KronA: ΔW = s·(A ⊗ B) with A[a1, a2], B[b1, b2], out = a1·b1, fan_in = a2·b2 (arXiv 2212.10650).

Both factors are full, so ΔW can have any rank; x is multiplied without forming A ⊗ B. B starts at 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import DeltaConfig
from ..contract.site import Op, Site
from ..contract.tensors import Shown, Stored
from ..core.forms.kron import Kronecker, KroneckerConfig
from ..maths.kron import apply_kron, kron

__all__ = ["KronAConfig"]


@dataclass
class KronAConfig(KroneckerConfig, DeltaConfig):
    """KronA (arXiv 2212.10650).

    a_shape: (a1, a2), the size of A, or None. scale: s, not trained. krona_dropout: on the input. init_weights: False
    draws B, too.
    """

    own_type = "KRONA"


class KronA(Kronecker):
    peft_type = "KRONA"
    config_class = KronAConfig
    summary = "Adds a scaled Kronecker product of two full matrices: few parameters, any rank."
    formula = "W' = W + s·(A ⊗ B)"
    paper = "arXiv 2212.10650"
    prefix = "krona_"
    pair_names = ("krona_A_weight", "krona_B_weight")
    tensors = {"krona_A_weight": Stored("krona_A", shape="a1 a2"), "krona_B_weight": Stored("krona_B", shape="b1 b2")}
    shown = Shown(settings=("scaling",), paths={"scaling": "strength"}, dropout="krona_dropout")
    examples = ({}, {"a_shape": (4, 2), "scale": 2.0, "krona_dropout": 0.1}, {"use_dora": True})

    def __init__(self, config: KronAConfig, site: Site) -> None:
        super().__init__(config, site)
        self.dropout = config.krona_dropout

    def delta(self) -> tuple[Tensor]:
        return (kron(*self.scaled()),)

    def term(self, x: Tensor, op: Op, dtype: torch.dtype) -> Tensor:
        if not op.geometry.is_matrix:
            return super().term(x, op, dtype)
        A, B = self.scaled()
        return apply_kron(x.to(dtype), A.to(dtype), B.to(dtype))

    def rank(self) -> int:
        return min(self.a1, self.a2) * min(self.b1, self.b2)
