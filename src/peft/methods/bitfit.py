"""BitFit: b' for every bias b of the targeted modules, trained from b itself (arXiv 2106.10199).

As a method of its own it takes every module that has a bias, unless targets are named. With any other method the config
field `bias` brings it along: "all" for every bias of the model, "<method>_only" for those of the targeted modules. The
base's biases never change: copies are trained, and saved under the names of the originals.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..config import TunerConfig
from ..core.copies import Copies, is_bias
from ..core.errors import NoMatchingPeftModuleError, Refusal
from ..core.method import Site
from ..core.targets import Place, find, names, walk

__all__ = ["BitFitConfig"]


@dataclass
class BitFitConfig(TunerConfig):
    """BitFit (arXiv 2106.10199). Its only settings are which modules' biases to train; all of them by default."""

    own_type = "BITFIT"


def own_biases(module: nn.Module) -> list[str]:
    """Names of the biases that a module holds itself, not through its children."""
    return [n for n, p in module._parameters.items() if p is not None and is_bias(n)]


class BitFit(Copies):
    peft_type = "BITFIT"
    config_class = BitFitConfig
    summary = "Trains the biases and nothing else."
    formula = "b' trained, from b' = b"
    paper = "arXiv 2106.10199"
    prefix = "bitfit_"
    holder = "bitfit_layers"
    keep_state = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    @classmethod
    def chosen(cls, names: list[str]) -> list[str]:
        """The module's own biases; those of its children where it has none (they are modules of their own)."""
        biases = [n for n in names if is_bias(n)]
        return [n for n in biases if "." not in n] or biases

    @classmethod
    def prepare(cls, config: BitFitConfig, model: nn.Module) -> None:
        """The names of all modules with a bias: short where every module of that name has one."""
        if config.target_modules is not None or config.target_parameters:
            return
        places = [p for p in walk(model) if p.owner is None]
        having = [p.path for p in places if own_biases(p.module)]
        lacking = {p.path.rpartition(".")[2] for p in places if not own_biases(p.module)}
        if not having:
            raise NoMatchingPeftModuleError(f"{cls.peft_type} trains biases, and no module of this model has one.")
        leaves = {path: path.rpartition(".")[2] for path in having}
        config.target_modules = list(
            dict.fromkeys(p if leaf in lacking or leaf.isdigit() else leaf for p, leaf in leaves.items())
        )

    @classmethod
    def check(cls, config: Any, site: Site) -> None:
        if not any(is_bias(n) for n in site.parameters()):
            raise Refusal(cls.peft_type, f"{site.path} ({site.layer})", "this module has no bias that could be trained")


@dataclass
class Along:
    """What the companion needs to know: which of its sites another method adapts, too."""

    targeted: set[str] = dataclasses.field(default_factory=set)


class BiasAlong(BitFit):
    companion = "bias"
    peft_type = ""
    examples = ()

    @classmethod
    def accompany(cls, config: Any, model: nn.Module) -> tuple[list[Place], Along]:
        targeted = find(model, config)
        saved = list(getattr(config, "modules_to_save", None) or [])
        places = targeted
        if config.bias == "all":
            places = [p for p in walk(model) if not any(names(s, q) for s in saved for q in _above(p.path))]
        # a composite's own raw parameters have other names on disk than `bias`, and are left alone as elsewhere
        places = [p for p in places if "bias" in own_biases(p.module) or (_virtual_bias(p) and p.stem != p.owner.stem)]
        return places, Along({p.path for p in targeted})

    @classmethod
    def chosen(cls, names: list[str]) -> list[str]:
        return [n for n in names if n == "bias"]

    def __init__(self, config: Along, site: Site) -> None:
        self.targeted = site.path in config.targeted
        super().__init__(config, site)

    def key(self, name: str) -> str:
        return f"base_layer.{name}" if self.targeted else name


def _virtual_bias(place: Place) -> bool:
    return place.owner is not None and getattr(place.module, "bias", None) is not None


def _above(path: str) -> list[str]:
    steps = path.split(".")
    return [".".join(steps[: i + 1]) for i in range(len(steps))]
