"""How adapters start. Of factored deltas: functions of the factors and the weight, independent of the layer kind.

A file lists such functions under the names that configs use. Those in `random` fill A and B in place:
`fn(A, B, rng, site)`. Those in `from_weight` return initial factors `fn(A, B, rng, site, scale, argument) -> (A0, B0)`,
which the layer subtracts, so that a fresh adapter is the identity and W is never changed. A name ending in `_` takes
the number that follows it as its argument (`pissa_niter_16`).
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from ..core.forms.low_rank import Start
from ..errors import near


@cache
def starts() -> dict[str, Start]:
    """By name, over all files here: the random ones first."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__))
    files = [importlib.import_module(f"peft.inits.{n}") for n in names]
    found = {name: Start(fill=fn) for f in files for name, fn in getattr(f, "random", {}).items()}
    return found | {name: Start(decompose=fn) for f in files for name, fn in getattr(f, "from_weight", {}).items()}


@cache
def find(value: bool | str) -> Start:
    """What `init_lora_weights` asks for."""
    name = value.lower() if isinstance(value, str) else "default" if value else "noise"
    for known, start in starts().items():
        argument = name[len(known) :]
        if name.startswith(known) and (argument.isdigit() if known.endswith("_") else not argument):
            return start._replace(argument=argument)
    names = list(starts())
    raise ValueError(
        f"Unknown initialization init_lora_weights={name!r}. Known: {', '.join(names)}.{near(name, names)}"
    )
