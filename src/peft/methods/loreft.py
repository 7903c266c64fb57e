"""LoReFT: edits hidden states in a low-rank subspace at chosen positions (arXiv 2404.03592).

    loreft   h ← h + Rᵀ(W h + b − R h)      R[r, width] with orthonormal rows, W[r, width], b[r]
    noreft   the same, with any R
    direft   h ← h + Rᵀ(W h + b)            with any R

R is the orthonormalised form of a free matrix V (its thin QR, with positive diagonal), so its rows stay orthonormal
under any optimiser, and V is what is saved. Training starts at W = R, b = 0, where nothing is changed yet.

An edit acts on the first p and the last s tokens of a sequence, padding not counted, each token once; in a causal LM
(`task_type`) with labels, on those of the prompt. Which tokens these are in a call: `core/acting/span.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TunerConfig
from ..config_fields import among, ranged
from ..contract.site import Site
from ..contract.tensors import Stored
from ..core.forms.edits import Edits
from ..maths.rotations import orthonormal_rows

__all__ = ["LoReftConfig"]


@dataclass
class LoReftConfig(TunerConfig):
    """LoReFT (arXiv 2404.03592).

    r: rank of the subspace. variant: "loreft", "noreft", "direft". prefix_positions, suffix_positions: p and s.
    all_positions: edit every token instead, which is also a change of weights that merges. tied_weights: first and last
    tokens share one edit; if not, a token that is both gets that of the first. dropout: on the edit. init_weights:
    "identity" (nothing is changed yet), "random" (W and b as a fresh linear layer, the paper's start).
    """

    own_type = "LOREFT"
    r: int = ranged(4)
    variant: str = among("loreft", ("loreft", "noreft", "direft"))
    prefix_positions: int = ranged(3, 0)
    suffix_positions: int = ranged(3, 0)
    all_positions: bool = False
    tied_weights: bool = True
    dropout: float = ranged(0.0, 0, 1)
    init_weights: str = among("identity", ("identity", "random"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.all_positions and self.prefix_positions + self.suffix_positions == 0:
            raise ValueError("`prefix_positions` and `suffix_positions` are both 0: there is no position to edit.")


class LoReft(Edits):
    peft_type = "LOREFT"
    config_class = LoReftConfig
    summary = "Edits the hidden states of the first and last tokens in a low-rank subspace."
    formula = "h ← h + Rᵀ(W h + b − R h), R Rᵀ = I"
    paper = "arXiv 2404.03592"
    prefix = "reft_"
    role = "blocks"
    tensors = {
        "reft_R_weight": Stored("reft_R", shape="edits config.r out"),  # V
        "reft_W_weight": Stored("reft_W", shape="edits config.r out"),
        "reft_b_weight": Stored("reft_b", shape="edits config.r"),
    }
    examples = (
        {"r": 2, "prefix_positions": 1, "suffix_positions": 1},
        {"r": 2, "prefix_positions": 1, "suffix_positions": 2, "tied_weights": False, "dropout": 0.1},
        {"r": 2, "variant": "noreft", "prefix_positions": 2, "suffix_positions": 0},
        {"r": 2, "variant": "direft", "all_positions": True},
        {"r": 2, "all_positions": True},
    )

    reft_R_weight: Tensor
    reft_W_weight: Tensor
    reft_b_weight: Tensor

    def __init__(self, config: LoReftConfig, site: Site) -> None:
        super().__init__(config, site)
        self.create(site)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        bound = site.geometry.out**-0.5
        for V in self.reft_R_weight:
            V.copy_(torch.linalg.qr(torch.randn(V.T.shape, generator=rng)).Q.T)
        for p in (self.reft_W_weight, self.reft_b_weight):
            nn.init.uniform_(p, -bound, bound, generator=rng)
        if self.config.init_weights == "identity":
            self.reft_b_weight.zero_()
            if self.config.variant == "direft":
                self.reft_R_weight.zero_()
            else:
                self.reft_W_weight.copy_(self.rotation())

    def rotation(self) -> Tensor:
        """R[edits, r, width]."""
        return orthonormal_rows(self.reft_R_weight) if self.config.variant == "loreft" else self.reft_R_weight

    def maps(self) -> tuple[Tensor, Tensor, Tensor]:
        R = self.rotation()
        W = self.reft_W_weight.to(R.dtype)
        return (W if self.config.variant == "direft" else W - R), R, self.reft_b_weight
