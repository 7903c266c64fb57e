"""LayerNorm tuning: P' for every parameter P of the targeted modules, trained from P itself (arXiv 2312.11420).

The targets are normalisation layers by default, but any module will do.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import TunerConfig, as_bias
from ..config_fields import own_field, reading
from ..config_values import AtLeast0
from ..contract.tensors import Shown
from ..core.forms.copies import Copies

__all__ = ["LNTuningConfig"]


@dataclass
class LNTuningConfig(TunerConfig):
    """LayerNorm tuning (arXiv 2312.11420). Its only settings are which modules to train."""

    own_type = "LN_TUNING"
    sets = ("exclude_modules",)
    bias: str = reading(as_bias, "none", own=True)
    layers_to_transform: list[AtLeast0] | AtLeast0 | None = own_field(None)
    layers_pattern: list[str] | str | None = own_field(None)


class LNTuning(Copies):
    peft_type = "LN_TUNING"
    config_class = LNTuningConfig
    summary = "Trains all parameters of the normalisation layers (or of any other modules) and nothing else."
    formula = "P' trained, from P' = P"
    paper = "arXiv 2312.11420"
    prefix = "ln_tuning_"
    role = "norms"
    shown = Shown(layer="ln_tuning.LNTuningLayer")
    holder = "ln_tuning_layers"
    examples = ({},)
