"""`modules_to_save`: whole modules that train along with an adapter and are saved with it, such as new heads.

Each adapter trains its own copy of every parameter of the module (and keeps its own running statistics), P' from P. The
module itself never changes, except by a merge, which puts the copy in its place. On disk a copy is the bare module,
`<module>.<parameter>`. With `ensure_weight_tying` the modules at the other ends of a tied weight come along, and all ends
share one copy of it.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..config import PromptLearningConfig, TunerConfig
from ..contract.capabilities import Companion, Exclusive
from ..contract.site import Site
from ..contract.tensors import Shown
from ..core.anatomy.targets import find_whole
from ..core.anatomy.ties import end_of, followers, shared_by_ends
from ..core.anatomy.walk import Place, walk
from ..core.forms.copies import Copies, outermost

Savers: TypeAlias = TunerConfig | PromptLearningConfig  # what has the field


class ModulesToSave(Companion, Exclusive, Copies):
    companion = "modules_to_save"
    peft_type = ""
    summary = "Trains whole modules along with any adapter."
    formula = "P' trained, from P' = P"
    prefix = "modules_to_save"
    shown = Shown(layer="ModulesToSaveWrapper")
    holder = "modules_to_save"
    repeats = ("modules_to_save.", "original_module.")  # upstream's files with bias="all" and a head

    @classmethod
    def accompany(cls, config: Savers, model: nn.Module) -> tuple[list[Place], Savers]:
        """Modules whose path ends with a name: unlike targets, a name may be the end of a longer one (upstream's rule)."""
        asked = config.modules_to_save or ()
        wanted = [asked] if isinstance(asked, str) else list(asked)
        places = [p for p in walk(model) if p.owner is None and p.path.endswith(tuple(wanted))]
        unmatched = [w for w in wanted if not any(p.path.endswith(w) for p in places)]
        places += find_whole(model, unmatched, "modules_to_save")
        return outermost(places + followers(config, model, places)), config

    @classmethod
    def shared_tensors(cls, config: Savers, sites: list[Site], rng: torch.Generator) -> dict[str, nn.Parameter]:
        """The copies of weights that several of the modules hold."""
        return shared_by_ends(config, sites, lambda s: {"weight": s.empty(*s.parameters()["weight"].shape)})

    def room(self, name: str, P: Tensor, site: Site) -> nn.Parameter:
        copy = end_of(site).parts.get(name)
        return super().room(name, P, site) if copy is None else copy

    def key(self, name: str) -> str:
        return name

    def held_alone(self) -> frozenset[object]:
        return frozenset(self.replaced_names)
