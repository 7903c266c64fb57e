"""Every model holds adapters of different methods."""

from ..core.model.tuner import Tuner as MixedModel
from ..registry import PeftType

COMPATIBLE_TUNER_TYPES = PeftType  # all of them

__all__ = ["COMPATIBLE_TUNER_TYPES", "MixedModel"]
