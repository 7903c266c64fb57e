"""KronA^B_res: a Kronecker branch beside a block, y = f(x) + s·(A ⊗ B) x + t·x with t learnt (arXiv 2212.10650).

f is the FFN block (or any module whose input and output have as many channels); A[a1, a2], B[b1, b2] with
a1·b1 = a2·b2 = channels. B and t start at 0, so that a fresh adapter is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract.refusals import refusal
from ..contract.site import Site
from ..contract.tensors import Shown, Stored
from ..core.forms.kron import Kronecker, KroneckerConfig
from ..maths.kron import apply_kron, kron
from .krona import KronA

__all__ = ["KronAResConfig"]


@dataclass
class KronAResConfig(KroneckerConfig):
    """KronA^B_res (arXiv 2212.10650).

    a_shape: (a1, a2), the size of A, or None. scale: s, not trained. residual: where the learnt scale t of the residual
    starts; 1.0 passes x on whole, 0.0 leaves the model as it is. krona_dropout: on the branch's input.
    """

    own_type = "KRONA_RES"
    residual: float = 0.0


class KronARes(Kronecker):
    peft_type = "KRONA_RES"
    config_class = KronAResConfig
    summary = "Puts a Kronecker product and a learnt residual beside a feed-forward block."
    formula = "h = FFN(x) + s·(A ⊗ B) x + t·x"
    paper = "arXiv 2212.10650"
    prefix = "krona_"
    pair_names = KronA.pair_names
    tensors = {**KronA.tensors, "krona_residual_weight": Stored("krona_residual", shape="1")}
    role = "mlps"
    shown = Shown(settings=("scaling",), paths={"scaling": "strength"})
    examples = ({}, {"scale": 2.0, "krona_dropout": 0.1})

    config: KronAResConfig
    krona_residual_weight: Tensor

    @classmethod
    def check(cls, config: KroneckerConfig, site: Site) -> None:
        g = site.geometry
        if not g.weightless and not g.is_matrix:
            reason = "a branch beside the layer needs its input as channels at the same positions as its output"
            raise refusal(cls, site, reason)
        if g.out != g.inputs:
            reason = (
                f"the residual adds the input to the output, but they have {g.inputs} and {g.out} channels: "
                "target the whole feed-forward block"
            )
            raise refusal(cls, site, reason)
        super().check(config, site)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        super().reset(rng, site)
        self.krona_residual_weight.fill_(self.config.residual)

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        A, B, t = (p.to(y.dtype) for p in (*self.scaled(), self.krona_residual_weight))
        x = x.to(y.dtype)
        branch = torch.nn.functional.dropout(x, self.config.krona_dropout, self.training)
        return y + apply_kron(branch, A, B) + self.multiplier * t * x

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Beside a single matrix the branch is W + s·(A ⊗ B) + t·I."""
        eye = torch.eye(W.shape[0], device=W.device, dtype=W.dtype)
        change = kron(*self.scaled()).to(W.dtype)
        return W + change + self.multiplier * self.krona_residual_weight.to(W.dtype) * eye, b
