"""Which adapters act: one immutable value."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .rows import Rows
from .span import Span

BASE = "__base__"  # a row that uses no adapter


@dataclass(frozen=True)
class Mix:
    """Immutable: the names of the adapters that act, in activation order, or one name per row."""

    active: tuple[str, ...] = ()
    rows: Rows | None = field(default=None, compare=False)
    span: Span | None = None  # which tokens the running call holds: core/acting/span.py
    tasks: Tensor | None = field(default=None, compare=False)  # one task id per row, for methods that have tasks
