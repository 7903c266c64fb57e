"""The stand-ins for transformers' stacks of experts: y_t = Σ_{e in top-k(t)} p_te · D_e g(U_e x_t), expert by expert.

The tokens routed to an expert go through its parts, whose adapters add their factors, so the delta of a stack never
exists. Where the adapters are thin products and nothing else, that is one node a stack instead of one call an expert.
When no adapter acts, the block's own forward runs, by whatever implementation the model's config names.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..contract.method import Method
from ..core.acting.adapted_layer import AdaptedLayer
from ..core.acting.roster import Roster
from ..errors import Refusal
from ..kernels.grouped import Deal, Stack, grouped_linear
from ..kernels.node import recorded, usable, with_zero_gradients
from ..kernels.terms import Thin
from .stacked import Stacked
from .weight_slice import WeightSlice

DOWN = "down_proj"


class Products(NamedTuple):
    """A stack of frozen matrices and what the acting adapters add: for each adapter a thin product for each matrix."""

    stack: Stack
    terms: list[list[Thin]]
    drop: list[float]

    def __call__(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        return grouped_linear(x, self.stack, counts, self.terms, self.drop)


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
        if (products := self.products(roster, x)) is not None and (
            y := self._dealt(products, x, index, weights)
        ) is not None:
            return y.reshape(hidden.shape)
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

    def _dealt(self, products: list[Products], x: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:
        """The output by products of whole stacks; None where some experts are other ranks'."""
        flat, experts = index.reshape(-1), len(self.of(DOWN))
        counts = torch.bincount(flat, minlength=experts).tolist()
        if len(counts) > experts:
            return None
        deal = Deal.of(torch.argsort(flat, stable=True), index.shape[1])
        y = self.stacks(products, deal.out(x), counts)
        y = y * weights.reshape(-1).index_select(0, deal.order)[:, None]
        return deal.back(y).to(x.dtype)

    def products(self, roster: Roster, x: Tensor) -> list[Products] | None:
        """What acts on each stack; None where that is more than products: adapters by row, hooks on an expert's parts,
        weights that train or that something keeps elsewhere."""
        if roster.mix.rows is not None or roster.exact or not usable(x) or _has_any_global_hook():
            return None
        if "_hf_hook" in self.base_layer.__dict__:
            return None
        found = []
        for name in self.single:
            if (one := self._products(name, roster.mix.active, x)) is None:
                return None
            found.append(one)
        return found

    def _products(self, name: str, names: tuple[str, ...], x: Tensor) -> Products | None:
        each, drops = [], set()
        for held in self.of(name):
            adapted = isinstance(held, AdaptedLayer)
            part = held.base_layer if isinstance(held, AdaptedLayer) else held
            if _hooked(held) or (adapted and _hooked(part)):
                return None
            methods = held.active_methods(names) if isinstance(held, AdaptedLayer) and not held.merged_adapters else ()
            terms = [_thin(m, held) for m in methods]
            each.append(terms)
            drops.add(tuple(m.dropout if m.training else 0.0 for m in methods))
        thin = [[t for t in terms if t is not None] for terms in each]
        if len(drops) > 1 or any(len(t) < len(terms) for t, terms in zip(thin, each, strict=True)):
            return None
        by_adapter = [list(terms) for terms in zip(*thin, strict=True)]
        if any(t.A.shape != terms[0].A.shape for terms in by_adapter for t in terms):
            return None
        assert isinstance(part, WeightSlice)
        W = self.base_layer._parameters.get(name)
        b = None if part.bias_name is None else self.base_layer._parameters.get(part.bias_name)
        if not _at_hand(W, x) or not (part.bias_name is None or _at_hand(b, x)):
            return None
        assert W is not None
        return Products(Stack(W.mT if part.transposed else W, b), by_adapter, list(drops.pop()))

    def stacks(self, products: list[Products], x: Tensor, counts: Sequence[int]) -> Tensor:
        """The experts' outputs for tokens sorted by expert, of which they have so many."""
        first, down = products if next(iter(self.single)) != DOWN else products[::-1]
        return self.after(down(self.between(first(x, counts)), counts))

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
        first = next(n for n in self.single if n != DOWN)
        h = self.between(_through(self.of(first)[e], x, row))
        return self.after(_through(self.of(DOWN)[e], h, row))

    def between(self, h: Tensor) -> Tensor:
        """What an expert does between its two matrices."""
        base: Any = self.base_layer
        inner: Tensor = base._apply_gate(h) if getattr(base, "has_gate", True) else base.act_fn(h)
        return inner

    def after(self, y: Tensor) -> Tensor:
        base: Any = self.base_layer
        return base.post_expert_norm(y) if getattr(base, "has_post_expert_norm", False) else y


class SortedExperts(Experts):
    """Experts that are each given all tokens, already weighted: x[E · T, h] (Llama 4)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        roster = self.acting()
        if roster is None:
            return self.base_layer(*args, **kwargs)
        hidden = args[0] if args else next(iter(kwargs.values()))
        each = hidden.reshape(len(self.of(DOWN)), -1, hidden.shape[-1])  # [E, T, h]
        if (products := self.products(roster, hidden)) is not None:
            counts = [each.shape[1]] * len(each)
            return self.stacks(products, each.flatten(0, 1), counts).reshape(-1, hidden.shape[-1])
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

    def between(self, h: Tensor) -> Tensor:
        base: Any = self.base_layer
        gate, up = h.chunk(2, dim=-1)
        inner: Tensor = up * base.act_fn(gate)
        return inner

    def after(self, y: Tensor) -> Tensor:
        return y


def _through(part: nn.Module, x: Tensor, row: Tensor | None) -> Tensor:
    return part(x, rows=row) if isinstance(part, AdaptedLayer) else part(x)


def _thin(m: Method, layer: nn.Module) -> Thin | None:
    """What a method adds where that is a thin product alone."""
    assert isinstance(layer, AdaptedLayer)
    term = m.fused_term(layer.op) if m.never_gathered and m.bias_change() is None else None
    return term if isinstance(term, Thin) and term.rows is None else None


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _at_hand(p: Tensor | None, x: Tensor) -> bool:
    """Whether a parameter is here as it is, frozen, and of x's dtype."""
    plain = type(p) is nn.Parameter and not p.requires_grad and not hasattr(p, "ds_id")
    return plain and p is not None and p.dtype is x.dtype and p.device == x.device
