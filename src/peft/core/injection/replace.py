"""One adapter in the place of another, under its name."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from ..acting.roster import Roster
from .commit import commit
from .plan import Plan
from .remove import delete

T = TypeVar("T")


def unused_name(roster: Roster) -> str:
    name = "%swap"
    while name in roster.adapters:
        name += "%"
    return name


def replace(model: nn.Module, roster: Roster, name: str, planned: Plan) -> None:
    """The planned methods in the place of the adapter's present ones; activation and training as they were."""
    asked, trainable, order = roster.asked, name in roster.training, list(roster.adapters)
    delete(model, name)
    planned.name = name
    commit(model, planned)
    _put_in_order(roster.adapters, order)
    _put_in_order(roster.configs, order)
    roster.activate_present(asked)
    roster.set_trainable(name, trainable)


def _put_in_order(table: dict[str, T], names: list[str]) -> None:
    entries = {n: table[n] for n in names}
    table.clear()
    table.update(entries)
