"""One module per row of the table; each has a TITLE and `cases(quick)`."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..case import Case

# in the order of the table
NAMES = (
    *("step", "saved", "dora", "methods", "optimiser", "inject", "add100", "switch", "load", "save", "merge", "rows"),
    *("hotswap", "compiled", "decode", "resident"),
)


def module(row: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{row}")


def cases(row: str, quick: bool = False) -> list[Case]:
    found = module(row).cases(quick)
    for case in found:
        case.quick = quick
    return found


def find(row: str, name: str, quick: bool) -> Case:
    return next(case for case in cases(row, quick) if case.name == name)
