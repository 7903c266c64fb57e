"""LoReFT: edits hidden states in a low-rank subspace at chosen positions (arXiv 2404.03592).

    loreft   h ← h + Rᵀ(W h + b − R h)      R[r, width] with orthonormal rows, W[r, width], b[r]
    noreft   the same, with any R
    direft   h ← h + Rᵀ(W h + b)            with any R

R is the orthonormalised form of a free matrix V (its thin QR, with positive diagonal), so its rows stay orthonormal
under any optimiser, and V is what is saved. Training starts at W = R, b = 0, where nothing is changed yet.

Positions. An edit acts on the first p and the last s tokens of a sequence, padding not counted, each token once. In a
model that takes token ids the core tells which tokens a call holds (`core/span.py`):
- the first p tokens are counted from the start of the sequence, whatever a key/value cache already holds;
- the last s tokens are those of the call that starts a sequence. A decoding step continues it: nothing is edited at its
  end. A call that continues a sequence with several tokens might end the prompt or not, so it is refused;
- in a causal LM (`task_type`) with labels, the prompt (the tokens before the first label) is the sequence whose ends
  count, so that training edits what generation edits. Decoding without a cache cannot know where the prompt ended.
Elsewhere (images, modules outside a language model) a call holds whole sequences: positions count along all axes
between the batch and the channels, and an output without such an axis is one position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import TunerConfig
from ..config_fields import require
from ..contract.capabilities import TakesSpan
from ..contract.method import Method
from ..contract.refusals import refusal, require_channels
from ..contract.site import Site
from ..contract.tensors import Stored
from ..core.acting.span import Span
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
    r: int = 4
    variant: str = "loreft"
    prefix_positions: int = 3
    suffix_positions: int = 3
    all_positions: bool = False
    tied_weights: bool = True
    dropout: float = 0.0
    init_weights: str = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "r")
        require(self, "prefix_positions", 0)
        require(self, "suffix_positions", 0)
        require(self, "dropout", 0, 1)
        for name, allowed in (("variant", ("loreft", "noreft", "direft")), ("init_weights", ("identity", "random"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` should be one of {allowed} but the value passed is {getattr(self, name)!r}")
        if not self.all_positions and self.prefix_positions + self.suffix_positions == 0:
            raise ValueError("`prefix_positions` and `suffix_positions` are both 0: there is no position to edit.")


class LoReft(TakesSpan, Method):
    peft_type = "LOREFT"
    config_class = LoReftConfig
    summary = "Edits the hidden states of the first and last tokens in a low-rank subspace."
    formula = "h ← h + Rᵀ(W h + b − R h), R Rᵀ = I"
    paper = "arXiv 2404.03592"
    prefix = "reft_"
    role = "blocks"
    tensors = {
        "reft_R": Stored(shape="edits config.r out"),  # V
        "reft_W": Stored(shape="edits config.r out"),
        "reft_b": Stored(shape="edits config.r"),
    }
    examples = (
        {"r": 2, "prefix_positions": 1, "suffix_positions": 1},
        {"r": 2, "prefix_positions": 1, "suffix_positions": 2, "tied_weights": False, "dropout": 0.1},
        {"r": 2, "variant": "noreft", "prefix_positions": 2, "suffix_positions": 0},
        {"r": 2, "variant": "direft", "all_positions": True},
        {"r": 2, "all_positions": True},
    )

    reft_R: Tensor
    reft_W: Tensor
    reft_b: Tensor

    def __init__(self, config: LoReftConfig, site: Site) -> None:
        super().__init__(config, site)
        self.edits = 1 if config.all_positions or config.tied_weights else 2  # one for all, or first and last apart
        self.create(site)

    @classmethod
    def check(cls, config: LoReftConfig, site: Site) -> None:
        super().check(config, site)
        require_channels(cls, site)
        if config.r > (out := site.geometry.out):
            reason = f"its output has {out} channels, in which there is no subspace of r={config.r} dimensions"
            raise refusal(cls, site, reason)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        bound = site.geometry.out**-0.5
        for V in self.reft_R:
            V.copy_(torch.linalg.qr(torch.randn(V.T.shape, generator=rng)).Q.T)
        nn.init.uniform_(self.reft_W, -bound, bound, generator=rng)
        nn.init.uniform_(self.reft_b, -bound, bound, generator=rng)
        if self.config.init_weights == "identity":
            self.reft_b.zero_()
            if self.config.variant == "direft":
                self.reft_R.zero_()
            else:
                self.reft_W.copy_(self.rotation())

    def rotation(self) -> Tensor:
        """R[edits, r, width]."""
        if self.config.variant != "loreft":
            return self.reft_R
        return orthonormal_rows(self.reft_R if self.reft_R.dtype == torch.float64 else self.reft_R.float())

    def factors(self) -> tuple[Tensor, Tensor]:
        """(P, R) with the edit h ← h + Rᵀ(P h + b), for each of the edits."""
        R = self.rotation()
        W = self.reft_W.to(R.dtype)
        return (W if self.config.variant == "direft" else W - R), R

    def after(self, y: Tensor, x: Any, span: Span | None = None) -> Tensor:
        P, R = (t.to(y.dtype) for t in self.factors())
        changes = []
        for p, r, b in zip(P, R, self.reft_b.to(y.dtype), strict=True):
            change = self.multiplier * F.linear(F.linear(y, p, b), r.T)
            changes.append(F.dropout(change, self.config.dropout, self.training))
        if self.config.all_positions:
            return y + changes[0]
        first, last = (at.reshape(*y.shape[:-1], 1) for at in self.positions(y, span))
        y = torch.where(first, y + changes[0], y)
        return torch.where(last & ~first, y + changes[-1], y)

    def positions(self, y: Tensor, span: Span | None) -> tuple[Tensor, Tensor]:
        """Which tokens of y are the first p and the last s of their sequences: two masks [rows, tokens]."""
        p, s = self.config.prefix_positions, self.config.suffix_positions
        if span is None or not span.fits(y):
            span = Span(y.shape[0], y[0, ..., 0].numel())
        number = span.numbers(y.device)
        inside = number >= 0
        if span.offset:
            if s and span.length > 1:
                raise ValueError(
                    f"{self.peft_type} with suffix_positions={s}: this call continues a cached sequence with "
                    f"{span.length} tokens, and whether the prompt ends with them cannot be known. Pass the whole prompt "
                    "in one call, or use prefix positions only."
                )
            return inside & (number < p), torch.zeros_like(inside)
        if self.config.task_type == "CAUSAL_LM" and span.prompt is not None:
            prompt = span.prompt.to(y.device)
            inside = inside & (prompt | ~prompt.any(1, keepdim=True))
        end = torch.where(inside, number + 1, 0).amax(1, keepdim=True)
        return inside & (number < p), inside & (number >= end - s)

    # -- merging: an edit of every token is affine --------------------------------------------------------------------
    @property
    def mergeable(self) -> bool:
        return self.config.all_positions and super().mergeable

    @property
    def shifts(self) -> bool:
        return self.config.all_positions and not self.geometry.indexed

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        P, R = (t[0].to(W.dtype) for t in self.factors())
        M = torch.eye(W.shape[0], dtype=W.dtype, device=W.device) + self.multiplier * R.T @ P
        shift = self.multiplier * R.T @ self.reft_b[0].to(W.dtype)
        if self.geometry.indexed:  # every output is one column of W
            return M @ W + shift[:, None], b
        return M @ W, shift if b is None else M @ b.to(W.dtype) + shift
