"""Tables from a method's name to its parts, read live from the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from . import registry
from .config import Fields, PeftConfig
from .contract.method import Method
from .core.model.functions import inject_adapter_in_model
from .core.model.tuner import Tuner
from .registry import PeftType

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "get_peft_config",
    "inject_adapter_in_model",
]

T = TypeVar("T")


class MethodTable(Mapping[PeftType, T]):
    """`peft_type -> part` over all registered methods, those of the user's own included."""

    def __init__(self, part: Callable[[type[Method]], T]) -> None:
        self._part = part

    def __getitem__(self, name: str) -> T:
        found = registry.methods().get(getattr(name, "value", name))
        if found is None:
            raise KeyError(name)
        return self._part(found)

    def __iter__(self) -> Iterator[PeftType]:
        return (PeftType(n) for n in registry.methods())

    def __len__(self) -> int:
        return len(registry.methods())


PEFT_TYPE_TO_CONFIG_MAPPING = MethodTable(lambda m: m.config_class)
PEFT_TYPE_TO_PREFIX_MAPPING = MethodTable(lambda m: m.prefix)
PEFT_TYPE_TO_TUNER_MAPPING = MethodTable(lambda m: Tuner)
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = PEFT_TYPE_TO_TUNER_MAPPING  # any methods mix


def get_peft_config(config_dict: Fields) -> PeftConfig:
    """The config object of a dictionary that names its `peft_type`."""
    return PeftConfig.from_dict(config_dict, source="get_peft_config")
