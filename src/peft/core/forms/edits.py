"""Low-rank affine edits of hidden states, of every token or of the first and last ones only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...contract.capabilities import TakesSpan
from ...contract.method import Method
from ...contract.refusals import refusal, require_channels
from ...contract.site import Site
from ...maths.networks import fold_affine
from ..acting.span import Span


class Edits(TakesSpan, Method):
    """h ← h + Rᵀ(P h + b) with P, R[r, out] and b[r], at the output h of a module; a subclass states `maps`.

    The config says where: `all_positions`, or the first `prefix_positions` and the last `suffix_positions` tokens, each
    once; in a causal LM (`task_type`) with labels, of the prompt. `tied_weights`: first and last share one edit; if not,
    a token that is both gets that of the first. `dropout`: on the edit. An edit of every token is a change of weights.
    """

    edits: int  # one for all, or first and last apart

    def __init__(self, config: object, site: Site) -> None:
        super().__init__(config, site)
        self.edits = 1 if self.config.all_positions or self.config.tied_weights else 2

    @classmethod
    def check(cls, config: Any, site: Site) -> None:
        super().check(config, site)
        require_channels(cls, site)
        if config.r > (out := site.geometry.out):
            reason = f"its output has {out} channels, in which there is no subspace of r={config.r} dimensions"
            raise refusal(cls, site, reason)

    def maps(self) -> tuple[Tensor, Tensor, Tensor]:
        """P[edits, r, out], R[edits, r, out], b[edits, r]."""
        raise NotImplementedError(f"{type(self).__name__}.maps")

    def after(self, y: Tensor, x: object, span: Span | None = None) -> Tensor:
        config = self.config
        edits = []
        for P, R, b in zip(*(t.to(y.dtype) for t in self.maps()), strict=True):
            edit = self.multiplier * F.linear(F.linear(y, P, b), R.T)
            edits.append(F.dropout(edit, config.dropout, self.training))
        if config.all_positions:
            return y + edits[0]
        masks = Span.of(y, span).ends(
            config.prefix_positions,
            config.suffix_positions,
            y.device,
            of_prompt=config.task_type == "CAUSAL_LM",
            method=self.peft_type,
        )
        first, last = (at.reshape(*y.shape[:-1], 1) for at in masks)
        return torch.where(first | last, y + torch.where(first, edits[0], edits[-1]), y)

    @property
    def mergeable(self) -> bool:
        return self.config.all_positions and super().mergeable

    @property
    def shifts(self) -> bool:
        return self.config.all_positions and not self.geometry.indexed

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        P, R, inner = (t[0].to(W.dtype) for t in self.maps())
        outer = self.multiplier * R.T
        M = torch.eye(len(W), dtype=W.dtype, device=W.device) + outer @ P
        return fold_affine(W, b, M, outer @ inner, table=self.geometry.indexed)
