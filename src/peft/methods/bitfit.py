"""BitFit: b' for every bias b of the targeted modules, trained from b itself (arXiv 2106.10199).

As a method of its own it takes every module that has a bias, unless targets are named. With any other method the config
field `bias` brings it along: "all" for every bias of the model, "<method>_only" for those of the targeted modules. The
base's biases never change: copies are trained, and saved under the names of the originals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..config import TunerConfig
from ..contract.site import Site
from ..core.anatomy.walk import walk
from ..core.forms.copies import Copies, is_bias
from ..errors import NoMatchingPeftModuleError, Refusal

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
    examples: ClassVar[tuple[dict[str, object], ...]] = ({},)

    @classmethod
    def chosen(cls, names: list[str]) -> list[str]:
        """The module's own biases; those of its children where it has none (they are modules of their own)."""
        biases = [n for n in names if is_bias(n)]
        return [n for n in biases if "." not in n] or biases

    @classmethod
    def prepare(cls, config: BitFitConfig, model: nn.Module) -> None:
        """The names of all modules with a bias: short where every module of that name has one."""
        if not config.names_no_target:
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
    def check(cls, config: object, site: Site) -> None:
        if not any(is_bias(n) for n in site.parameters()):
            raise Refusal(cls.peft_type, f"{site.path} ({site.layer})", "this module has no bias that could be trained")
