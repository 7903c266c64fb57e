"""The three ways of counting that the survey (arXiv 2303.15647) asks people to keep apart.

Trainable parameters get gradients and optimiser state; updated parameters are the base weights whose value differs
in the end (all of W for LoRA, the biases for BitFit, none for a prompt); the rank is that of each weight's update.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...contract.method import Method
from ..acting.on_model import base_of, roster_of
from ..anatomy.walk import walk


@dataclass
class Counts:
    """trainable, updated, total: numbers of parameters. rank: the largest of `ranks` (path -> rank, None: no rank)."""

    trainable: int
    updated: int
    total: int
    rank: int | None
    ranks: dict[str, int | None] = field(repr=False, default_factory=dict)


def counts(model: nn.Module, adapter: str | None = None) -> Counts:
    """The survey's counts for one adapter, or for all that are active."""
    roster = roster_of(model)
    if roster is None:
        raise ValueError("This model has no adapters.")
    names = [adapter] if adapter is not None else list(roster.chosen)
    roster.known(names)
    paths = {p.disk_path: p for p in walk(base_of(model))}
    trainable = {
        id(p): count(p)
        for n in names
        for _, m in roster.adapters[n].methods
        for attr, p in m.named_parameters()
        if attr not in m.table.frozen
    }
    updated: dict[int, int] = {}
    ranks: dict[str, int | None] = {}
    for name in names:
        for disk_path, m in roster.adapters[name].methods:
            if not disk_path:
                continue
            place = paths[disk_path]
            ranks[place.path] = _add(ranks.get(place.path), m.rank(), m.geometry.out, m.geometry.fan_in)
            for p in _changed(m, place.module):
                updated[id(p)] = count(p)
    found = [r for r in ranks.values() if r is not None]
    total = sum(count(p) for p in model.parameters())
    return Counts(sum(trainable.values()), sum(updated.values()), total, max(found, default=None), ranks)


def _add(a: int | None, b: int | None, out: int, fan_in: int) -> int | None:
    """Ranks of a sum: they add up, to at most the matrix's own."""
    if a is None or b is None:
        return a if b is None else b
    return min(a + b, out, fan_in)


def _changed(m: Method, module: nn.Module) -> list[torch.Tensor]:
    """The base parameters whose value a merge of this method changes."""
    own: dict[str, torch.Tensor] = dict(module.named_parameters())
    if m.form == "replace":
        return [own[n] for n in m.replaced_names if n in own]
    if not m.mergeable:
        return []
    names = ["weight"] if m.form in ("delta", "weight", "before") else ["weight", "bias"]
    if m.form in ("delta", "weight") and m.bias_change() is not None:
        names.append("bias")
    return [own[n] for n in names if n in own] or ([] if "weight" in own else list(own.values())[:1])


def count(p: Tensor) -> int:
    """A parameter's logical number of entries: 4-bit codes hold two in a byte; ZeRO-3 keeps the size aside."""
    n = p.numel()
    if n == 0 and hasattr(p, "ds_numel"):
        n = int(p.ds_numel)
    state = getattr(p, "quant_state", None)
    if state is not None and getattr(state, "shape", None) is not None:
        return int(torch.Size(state.shape).numel())
    if type(p).__name__ == "Params4bit":
        return n * 2 * getattr(getattr(p, "quant_storage", torch.uint8), "itemsize", 1)
    return n


def trainable_and_total(model: nn.Module) -> tuple[int, int]:
    """How many of a model's parameters train, and how many there are; coded ones by their logical size."""
    sizes = [(count(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
