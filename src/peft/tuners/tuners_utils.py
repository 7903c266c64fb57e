"""What other libraries import from here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..config import TunerConfig
from ..contract.offload import on_device
from ..core.anatomy.patterns import matches
from ..core.anatomy.targets import ALL_LINEAR as INCLUDE_LINEAR_LAYERS_SHORTHAND
from ..core.anatomy.targets import in_layers
from ..core.anatomy.walk import walk
from ..core.model.tuner import Tuner as BaseTuner
from ..functional import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from ..mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from ..upstream.classes import BaseTunerLayer

__all__ = [
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "BaseTuner",
    "BaseTunerLayer",
    "cast_adapter_dtype",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "delete_adapter",
    "inspect_matched_modules",
    "onload_layer",
    "set_adapter",
    "set_requires_grad",
]


def check_target_module_exists(config: TunerConfig, key: str) -> bool:
    """Whether a config targets the module of this path."""
    if matches(getattr(config, "exclude_modules", None), key):
        return False
    return matches(config.target_modules, key) and in_layers(config, key)


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """Within, an offloaded layer's weights are present; changes to them are kept."""
    with on_device(getattr(layer, "base_layer", layer)):
        yield


def check_adapters_to_merge(module: BaseTunerLayer, adapter_names: list[str] | None = None) -> list[str]:
    """The adapters of a layer that a merge would still write."""
    wanted = module.active_adapters if adapter_names is None else adapter_names
    return [n for n in wanted if n not in module.merged_adapters]


def inspect_matched_modules(tuner: BaseTuner, adapter_name: str = "default") -> dict[str, list[str]]:
    """Paths of the base model that an adapter reaches, and the others."""
    tuner.roster.known([adapter_name])
    reached = set(tuner.roster.adapters[adapter_name].targeted)
    leaves: list[str] = [p.path for p in walk(tuner.model) if not any(isinstance(m, nn.ModuleList) for m in [p.module])]
    return {"matched": [p for p in leaves if p in reached], "unmatched": [p for p in leaves if p not in reached]}
