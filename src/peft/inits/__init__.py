"""How factored deltas start: functions of the factors and the weight, independent of the layer kind.

A file lists its functions under the names that configs use. Those in `random` fill A and B in place:
`fn(A, B, rng, site)`. Those in `from_weight` return initial factors `fn(A, B, rng, site, scale, argument) -> (A0, B0)`,
which the layer subtracts, so that a fresh adapter is the identity and W is never changed. A name ending in `_` takes
the number that follows it as its argument (`pissa_niter_16`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

from ..errors import near

Start: TypeAlias = Callable[..., Any]  # of either sort


@cache
def table(which: str) -> dict[str, Start]:
    """`name -> function` over all files here, for `which` in ("random", "from_weight")."""
    found: dict[str, Start] = {}
    for m in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        found.update(getattr(importlib.import_module(f"peft.inits.{m.name}"), which, {}))
    return found


@cache
def find(value: bool | str) -> tuple[Start, str, bool]:
    """(function, argument, whether it starts from W) for what `init_lora_weights` says."""
    name = value.lower() if isinstance(value, str) else "default" if value else "noise"
    for which in ("random", "from_weight"):
        for known, fn in table(which).items():
            argument = name[len(known) :]
            if name.startswith(known) and (argument.isdigit() if known.endswith("_") else not argument):
                return fn, argument, which == "from_weight"
    names = [*table("random"), *table("from_weight")]
    raise ValueError(
        f"Unknown initialization init_lora_weights={name!r}. Known: {', '.join(names)}.{near(name, names)}"
    )
