"""The config field `bias`: biases that train along with any method.

"all" takes every bias of the model, "<method>_only" those of the targeted modules. The base's biases never change: copies
are trained, and saved under the names of the originals.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import nn

from ..config import TunerConfig
from ..contract.capabilities import Companion
from ..contract.site import Site
from ..core.anatomy.patterns import means
from ..core.anatomy.targets import find
from ..core.anatomy.walk import Place, walk
from ..methods.bitfit import BitFit, own_biases


@dataclass
class BiasSites:
    """What the companion needs to know: which of its sites another method adapts, too."""

    targeted: set[str] = dataclasses.field(default_factory=set)


class BiasAlong(Companion, BitFit):
    companion = "bias"
    peft_type = ""
    examples = ()

    @classmethod
    def accompany(cls, config: TunerConfig, model: nn.Module) -> tuple[list[Place], BiasSites]:
        targeted = find(model, config)
        saved = list(config.modules_to_save or [])
        places = targeted
        if config.bias == "all":
            places = [p for p in walk(model) if not any(means(s, q) for s in saved for q in _above(p.path))]
        places = [p for p in places if "bias" in own_biases(p.module) or _virtual_bias(p)]
        return places, BiasSites({p.path for p in targeted})

    @classmethod
    def chosen(cls, names: list[str]) -> list[str]:
        return [n for n in names if n == "bias"]

    def __init__(self, config: BiasSites, site: Site) -> None:
        self.targeted = site.path in config.targeted
        super().__init__(config, site)

    def key(self, name: str) -> str:
        return f"base_layer.{name}" if self.targeted else name


def _virtual_bias(place: Place) -> bool:
    """Whether a part has a bias that the composite holds for it. A composite's own raw parameters have other names on
    disk than `bias`, and are left alone as elsewhere."""
    if place.owner is None or place.disk_path == place.owner.disk_path:
        return False
    return getattr(place.module, "bias", None) is not None


def _above(path: str) -> list[str]:
    steps = path.split(".")
    return [".".join(steps[: i + 1]) for i in range(len(steps))]
