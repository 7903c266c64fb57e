"""Whole embeddings that came with an adapter's file and differ from the base's: a part of the adapter, which never trains.

The config field `saved_embeddings` says which, by path; loading fills it. It is not written: as in upstream's files, the
keys say it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor, nn

from ..config import PeftConfig, TunerConfig
from ..contract.capabilities import Companion
from ..contract.site import Site
from ..core.anatomy.targets import find
from ..core.anatomy.walk import Place, walk
from ..core.forms.copies import Copies


@dataclass
class EmbeddingSites:
    """What the companion needs to know: which of its sites the method adapts, too."""

    targeted: set[str]


class SavedEmbeddings(Companion, Copies):
    companion = "saved_embeddings"
    peft_type = ""
    summary = "Whole embeddings from an adapter's file."
    formula = "P' from the file"
    holder = "saved_embeddings"
    keep_state = False

    @classmethod
    def accompany(cls, config: PeftConfig, model: nn.Module) -> tuple[list[Place], EmbeddingSites]:
        wanted = set(config.saved_embeddings or ())
        targeted = {p.path for p in find(model, config, strict=False)} if isinstance(config, TunerConfig) else set()
        return [p for p in walk(model) if p.path in wanted], EmbeddingSites(targeted)

    @classmethod
    def chosen(cls, names: list[str]) -> list[str]:
        return [n for n in names if n == "weight"]

    def __init__(self, config: EmbeddingSites, site: Site) -> None:
        self.targeted = site.path in config.targeted
        super().__init__(config, site)
        self.set(table=dataclasses.replace(self.table, frozen=tuple(self.table.keys)))

    def room(self, name: str, P: Tensor, site: Site) -> nn.Parameter:
        made = super().room(name, P, site)
        made.requires_grad = False
        return made

    def key(self, name: str) -> str:
        return f"base_layer.{name}" if self.targeted else name
