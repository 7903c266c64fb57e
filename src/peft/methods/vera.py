"""VeRA: ΔW = diag(b) B diag(d) A with frozen random A, B shared by all sites; only b and d train (arXiv 2310.11454).

The banks A[r, largest fan_in] and B[largest out, r] are drawn from `projection_prng_key`; a site uses their first
columns and rows. b[out] starts at 0, d[r] at `d_initial`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import DeltaConfig
from ..config_fields import own_field, require
from ..contract.method import Method
from ..contract.site import Op, Site
from ..contract.tensors import Shown, Stored
from ..kernels.terms import Banks

__all__ = ["VeraConfig"]


@dataclass
class VeraConfig(DeltaConfig):
    """VeRA (arXiv 2310.11454).

    r: rank of the shared banks. projection_prng_key: their seed. save_projection: write the banks to the file; without
    them the file is smaller and the banks are drawn again. vera_dropout: on the input. d_initial: where d starts.
    """

    own_type = "VERA"
    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False  # the layer kind knows its layout; kept for checkpoints
    init_weights: bool = True
    exclude_modules: list[str] | str | None = own_field(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "r")
        require(self, "vera_dropout", 0, 1)


class Vera(Method):
    peft_type = "VERA"
    config_class = VeraConfig
    summary = "Trains two scaling vectors around random matrices that all layers share."
    formula = "W' = W + diag(b) B diag(d) A"
    paper = "arXiv 2310.11454"
    prefix = "vera_lambda_"
    tensors = {
        "vera_lambda_d": Stored(shape="r"),
        "vera_lambda_b": Stored(shape="out"),
        # a file's banks may be larger: those of an adapter that was made beside one with larger layers
        "vera_A": Stored(shared=True, frozen=True, grows=1),
        "vera_B": Stored(shared=True, frozen=True, grows=0),
    }
    shown = Shown(settings=("r",), dropout="vera_dropout")
    examples = (
        {"r": 8},
        {"r": 8, "save_projection": False, "vera_dropout": 0.1, "projection_prng_key": 5},
        {"r": 8, "use_dora": True},
    )

    def __init__(self, config: VeraConfig, site: Site) -> None:
        super().__init__(config, site)
        self.r, self.dropout = config.r, config.vera_dropout
        self.create(site)
        self.vera_A, self.vera_B = site.shared["vera_A"], site.shared["vera_B"]
        if not config.save_projection:
            self.set(table=self.table.without("vera_A", "vera_B"))

    @classmethod
    def shared_tensors(cls, config: VeraConfig, sites: list[Site], rng: torch.Generator) -> dict[str, nn.Parameter]:
        """The banks, uniform in ±√(6/columns), A first: the same stream as in checkpoints that leave them out."""
        key = torch.Generator().manual_seed(config.projection_prng_key)
        out, fan_in = max(s.geometry.out for s in sites), max(s.geometry.fan_in for s in sites)
        banks = {}
        for name, shape in (("vera_A", (config.r, fan_in)), ("vera_B", (out, config.r))):
            bound = math.sqrt(6 / shape[1])
            values = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=key)
            banks[name] = nn.Parameter(values.to(sites[0].dtype), requires_grad=False)
        return banks

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        self.vera_lambda_d.fill_(self.config.d_initial)
        self.vera_lambda_b.zero_()
        if not self.config.init_weights:
            nn.init.normal_(self.vera_lambda_d, generator=rng)
            nn.init.ones_(self.vera_lambda_b)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """This site's part of the banks: (A[r, fan_in], B[out, r])."""
        A, B = self.vera_A[:, : self.geometry.fan_in], self.vera_B[: self.geometry.out]
        return A.to(self.vera_lambda_d.device), B.to(self.vera_lambda_b.device)

    def delta(self) -> tuple[Tensor, Tensor]:
        A, B = self.matrices()
        return self.vera_lambda_d[:, None] * A, self.multiplier * self.vera_lambda_b[:, None] * B

    def term(self, x: Tensor, op: Op, dtype: torch.dtype) -> Tensor:
        if not op.geometry.factored:
            return super().term(x, op, dtype)
        A, B = self.matrices()  # scaling activations spares the gradients of d·A and b·B, which nobody needs
        h = op.scale(op(x, A.to(dtype)), self.vera_lambda_d.to(dtype))
        return op.scale(op.pointwise(h, B.to(dtype)), (self.multiplier * self.vera_lambda_b).to(dtype))

    def fused_term(self, op: Op) -> Banks:
        return Banks(*self.matrices(), self.vera_lambda_d, self.vera_lambda_b, self.multiplier)

    def rank(self) -> int:
        return min(self.r, self.geometry.out, self.geometry.fan_in)
