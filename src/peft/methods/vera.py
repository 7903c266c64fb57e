"""VeRA: ΔW = diag(b) B diag(d) A with frozen random A, B shared by all sites; only b and d train (arXiv 2310.11454).

The banks A[r, largest fan_in] and B[largest out, r] are drawn from `projection_prng_key`; a site uses their first
columns and rows. b[out] starts at 0, d[r] at `d_initial`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import DeltaConfig, LayoutConfig
from ..config_fields import own_field, ranged
from ..contract.site import Site
from ..contract.tensors import Shown, Stored
from ..core.forms.banks import VectorsAroundBanks, uniform_bank
from ..kernels.terms import Banks

__all__ = ["VeraConfig"]


@dataclass
class VeraConfig(LayoutConfig, DeltaConfig):
    """VeRA (arXiv 2310.11454).

    r: rank of the shared banks. projection_prng_key: their seed. save_projection: write the banks to the file; without
    them the file is smaller and the banks are drawn again. vera_dropout: on the input. d_initial: where d starts.
    """

    own_type = "VERA"
    r: int = ranged(256)
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = ranged(0.0, 0, 1)
    d_initial: float = 0.1
    init_weights: bool = True
    exclude_modules: list[str] | str | None = own_field(None)


class Vera(VectorsAroundBanks):
    peft_type = "VERA"
    config_class = VeraConfig
    summary = "Trains two scaling vectors around random matrices that all layers share."
    formula = "W' = W + diag(b) B diag(d) A"
    paper = "arXiv 2310.11454"
    prefix = "vera_lambda_"
    tensors = {
        "vera_lambda_d_weight": Stored("vera_lambda_d", shape="own_r"),
        "vera_lambda_b_weight": Stored("vera_lambda_b", shape="out"),
        # a file's banks may be larger: those of an adapter that was made beside one with larger layers
        "vera_A_weight": Stored("vera_A", shared=True, frozen=True, grows=1),
        "vera_B_weight": Stored("vera_B", shared=True, frozen=True, grows=0),
    }
    shown = Shown(settings=("r",), paths={"r": "own_r"}, dropout="vera_dropout")
    examples = (
        {"r": 8},
        {"r": 8, "save_projection": False, "vera_dropout": 0.1, "projection_prng_key": 5},
        {"r": 8, "use_dora": True},
    )

    config: VeraConfig
    vera_lambda_d_weight: Tensor
    vera_lambda_b_weight: Tensor
    vera_A_weight: Tensor
    vera_B_weight: Tensor

    def __init__(self, config: VeraConfig, site: Site) -> None:
        super().__init__(config, site)
        self.own_r, self.dropout = config.r, config.vera_dropout
        self.create(site)
        self.vera_A_weight, self.vera_B_weight = site.shared["vera_A_weight"], site.shared["vera_B_weight"]
        if not config.save_projection:
            self.set(table=self.table.without("vera_A_weight", "vera_B_weight"))

    @classmethod
    def shared_tensors(cls, config: VeraConfig, sites: list[Site], rng: torch.Generator) -> dict[str, nn.Parameter]:
        """The banks, A first: the same stream as in checkpoints that leave them out."""
        key = torch.Generator().manual_seed(config.projection_prng_key)
        out, fan_in = max(s.geometry.out for s in sites), max(s.geometry.fan_in for s in sites)
        shapes = {"vera_A_weight": (config.r, fan_in), "vera_B_weight": (out, config.r)}
        return {name: uniform_bank(*shape, sites[0].dtype, key) for name, shape in shapes.items()}

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        fresh, d = self.config.init_weights, self.vera_lambda_d_weight
        d.fill_(self.config.d_initial) if fresh else d.normal_(generator=rng)
        self.vera_lambda_b_weight.fill_(0 if fresh else 1)

    def banks(self) -> Banks:
        """The site's part of the shared ones, and its vectors."""
        d, b = self.vera_lambda_d_weight, self.vera_lambda_b_weight
        A, B = self.vera_A_weight[:, : self.geometry.fan_in], self.vera_B_weight[: self.geometry.out]
        return Banks(A.to(d.device), B.to(b.device), d, b, self.multiplier)
