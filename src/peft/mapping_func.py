"""Upstream's path to `get_peft_model`."""

from .core.model.functions import get_peft_model
from .core.model.peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from .mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "get_peft_model",
]
