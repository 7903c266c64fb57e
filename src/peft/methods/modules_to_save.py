"""`modules_to_save`: whole modules that train along with an adapter and are saved with it, such as new heads.

Each adapter trains its own copy of every parameter of the module (and keeps its own running statistics), P' from P. The
module itself never changes, except by a merge, which puts the copy in its place. On disk a copy is the bare module,
`<module>.<parameter>`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.copies import Copies, outermost
from ..core.targets import Place, find_whole, walk


class ModulesToSave(Copies):
    companion = "modules_to_save"
    peft_type = ""
    summary = "Trains whole modules along with any adapter."
    formula = "P' trained, from P' = P"
    prefix = "modules_to_save"
    holder = "modules_to_save"

    @classmethod
    def accompany(cls, config: Any, model: nn.Module) -> tuple[list[Place], Any]:
        """Modules whose path ends with a name: unlike targets, a name may be the end of a longer one (upstream's rule)."""
        wanted = config.modules_to_save
        wanted = [wanted] if isinstance(wanted, str) else list(wanted)
        places = [p for p in walk(model) if p.owner is None and p.path.endswith(tuple(wanted))]
        unmatched = [w for w in wanted if not any(p.path.endswith(w) for p in places)]
        return outermost(places + find_whole(model, unmatched, "modules_to_save")), config

    def key(self, name: str) -> str:
        return name
