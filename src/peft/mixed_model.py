"""Upstream's path to the model of several methods, which every model is here."""

from .core.model.peft_model import PeftMixedModel

__all__ = ["PeftMixedModel"]
