"""Where base layer and adapters are products and nothing else: the whole sum by one kernel instead of term by term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...contract.method import Method
from ...kernels.banked import banked_linear
from ...kernels.lowrank import lowrank_linear
from ...kernels.node import usable
from ...kernels.rows import rows_linear
from ...kernels.scaled import scaled_linear
from ...kernels.terms import Thin
from ..acting.adapted_layer import AdaptedLayer
from ..acting.rows import Rows


def run(layer: AdaptedLayer, methods: Sequence[Method], x: Any) -> Tensor | None:
    """The layer's output with these methods at x, whatever x is; None where it takes more than such products."""
    if (base := _base(layer, x)) is None:
        return None
    terms, drop = [], None
    for m in methods:
        term = m.fused_term(layer.op) if m.never_gathered else None
        if not isinstance(term, Thin):
            return (
                None
                if term is None or len(methods) > 1 or (m.dropout and m.training)
                else banked_linear(x, *base, term)
            )
        if term.rows is not None and len(methods) > 1:
            return None
        terms.append(term)
        if m.training and m.dropout:
            drop = [n.dropout if n.training else 0.0 for n in methods]
    if terms[0].rows is not None:
        y = scaled_linear(x, *base, terms[0], drop[0] if drop else 0.0)
    else:
        y = lowrank_linear(x, *base, terms, drop)
    for m in methods:
        if (bias := m.bias_change()) is not None:
            y = y + bias.to(y.dtype)
    return y


def run_rows(
    layer: AdaptedLayer, table: Mapping[str, Sequence[Method]], rows: Rows, row: Tensor | None, x: Tensor
) -> Tensor | None:
    """The same with an adapter per row of the batch, whose methods here are in `table`. row: the batch row of each of
    x's rows, where x lost it."""
    base = _base(layer, x)
    if base is None or x.dim() < 2:
        return None
    terms, where, op = [], [], layer.op
    drops: list[float] = []
    for name, at in rows.places(x, layer.path) if row is None else rows.places_of(row, x):
        for m in table[name]:
            term = m.fused_term(op) if m.never_gathered and m.bias_change() is None else None
            if not isinstance(term, Thin) or term.rows is not None:
                return None
            terms.append(term)
            drops.append(m.dropout if m.training else 0.0)
            where.append(at)
    drop = drops if any(drops) else None
    if (y := rows_linear(x, *base, terms, where, drop, rows.scratch)) is not None:
        return y
    return lowrank_linear(x, *base, terms, drop, where)


def products(layer: AdaptedLayer, methods: Sequence[Method]) -> tuple[Tensor, list[Thin]] | None:
    """(W, terms) where what these methods change is W and nothing else, by thin products."""
    base = layer.kind.as_linear(layer.base_layer)
    if base is None:
        return None
    terms = []
    for m in methods:
        term = m.fused_term(layer.op) if m.never_gathered and m.bias_change() is None else None
        if not isinstance(term, Thin) or term.rows is not None:
            return None
        terms.append(term)
    return base[0], terms


def _base(layer: AdaptedLayer, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """(W, b) of a base layer that is a product of x's own dtype, where a kernel may run at all."""
    if layer.roster.exact or not usable(x):
        return None
    base = layer.kind.as_linear(layer.op.base)
    return None if base is None or base[0].dtype is not x.dtype else base
