"""The stand-ins for transformers' stacks of experts: y_t = Σ_{e in top-k(t)} p_te · D_e g(U_e x_t), expert by expert.

The tokens routed to an expert go through its parts, whose adapters add their factors, so the delta of a stack never
exists. When no adapter acts, the block's own forward runs, by whatever implementation the model's config names.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.acting.adapted_layer import AdaptedLayer
from ..core.acting.roster import Roster
from ..errors import Refusal
from ..kernels.node import recorded, with_zero_gradients
from .stacked import Stacked

DOWN = "down_proj"


class Experts(Stacked):
    """Experts that are given tokens and their routing (`use_experts_implementation` in transformers)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        roster = self.acting()
        if roster is None:
            return self.base_layer(*args, **kwargs)
        if kwargs:
            bound = inspect.signature(type(self.base_layer).forward).bind(self.base_layer, *args, **kwargs)
            args = tuple(bound.arguments.values())[1:]
        hidden, index, weights = args[:3]
        x = hidden.reshape(-1, hidden.shape[-1])  # [T, h]
        index, weights = index.flatten(0, -2), weights.flatten(0, -2)  # [T, k]
        row = self.rows_of(roster, x.shape[0], x.device)
        out = torch.zeros_like(x)
        idle = set(range(len(self.of(DOWN))))
        for e, token, weight in self._routes(index, weights):
            idle.discard(e)
            chosen = x if token is None else x[token]
            y = self.expert(e, chosen, row if row is None or token is None else row[token])
            y = (y * weight[:, None]).to(out.dtype)
            out = out + y if token is None else out.index_add(0, token, y)
        if idle and torch.is_grad_enabled():
            out = self._with_idle(out, x[:0], None if row is None else row[:0], idle)
        return out.reshape(hidden.shape)

    def _with_idle(self, out: Tensor, none: Tensor, row: Tensor | None, idle: set[int]) -> Tensor:
        """The output with gradients of zero, not None, for the adapters of experts without tokens: distributed training
        waits for every parameter's."""
        parts = [p for n in self.single for e in idle if isinstance(p := self.of(n)[e], AdaptedLayer) and p.acting]
        mix = parts[0].roster.mix if parts else None
        names = () if mix is None else mix.active if mix.rows is None else mix.rows.distinct
        methods = [m for part in parts for m in part.active_methods(names)]
        if all(m.never_gathered for m in methods):
            return with_zero_gradients(out, [p for m in methods for p in m.parameters() if p.requires_grad])
        for e in idle:  # their tensors are there during calls only
            out = out + self.expert(e, none, row).sum()
        return out

    def _routes(self, index: Tensor, weights: Tensor) -> Iterator[tuple[int, Tensor | None, Tensor]]:
        """(expert, its tokens, their weights); in a compiled graph, whose shapes are fixed, all tokens with weight 0
        for those routed elsewhere. Indices past the last expert belong to other ranks."""
        experts = len(self.of(DOWN))
        if recorded():
            for e in range(experts):
                yield e, None, (weights * (index == e)).sum(-1)
            return
        flat = index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        ends = torch.bincount(flat, minlength=experts)[:experts].cumsum(0).tolist()
        start = 0
        for e, end in enumerate(ends):
            if end > start:
                pairs = order[start:end]
                yield e, pairs // index.shape[1], weights.reshape(-1)[pairs]
            start = end

    def rows_of(self, roster: Roster, n: int, device: torch.device) -> Tensor | None:
        """The batch row of each token, where rows have adapters of their own."""
        return None if roster.mix.rows is None else roster.mix.rows.row_of(n, self.adapted()[0].path, device)

    def expert(self, e: int, x: Tensor, row: Tensor | None) -> Tensor:
        base: Any = self.base_layer
        first = next(n for n in self.single if n != DOWN)
        h = _through(self.of(first)[e], x, row)
        h = base._apply_gate(h) if getattr(base, "has_gate", True) else base.act_fn(h)
        y = _through(self.of(DOWN)[e], h, row)
        return base.post_expert_norm(y) if getattr(base, "has_post_expert_norm", False) else y


class SortedExperts(Experts):
    """Experts that are each given all tokens, already weighted: x[E · T, h] (Llama 4)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        roster = self.acting()
        if roster is None:
            return self.base_layer(*args, **kwargs)
        hidden = args[0] if args else next(iter(kwargs.values()))
        each = hidden.reshape(len(self.of(DOWN)), -1, hidden.shape[-1])  # [E, T, h]
        rows = roster.mix.rows
        if rows is not None and each.shape[1] % len(rows):
            raise Refusal(
                "adapter_names",
                self.adapted()[0].path,
                f"each expert sees {each.shape[1]} tokens, which {len(rows)} rows of a batch cannot share evenly",
            )
        row = self.rows_of(roster, each.shape[1], hidden.device)
        out = torch.stack([self.expert(e, x, row) for e, x in enumerate(each)])
        return out.reshape(-1, hidden.shape[-1])

    def expert(self, e: int, x: Tensor, row: Tensor | None) -> Tensor:
        base: Any = self.base_layer
        first = next(n for n in self.single if n != DOWN)
        gate, up = _through(self.of(first)[e], x, row).chunk(2, dim=-1)
        return _through(self.of(DOWN)[e], up * base.act_fn(gate), row)


def _through(part: nn.Module, x: Tensor, row: Tensor | None) -> Tensor:
    return part(x, rows=row) if isinstance(part, AdaptedLayer) else part(x)
