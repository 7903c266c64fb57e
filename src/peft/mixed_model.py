"""Upstream's path to the model of several methods, which every model is here."""

from .core.model.task_models import PeftMixedModel

__all__ = ["PeftMixedModel"]
