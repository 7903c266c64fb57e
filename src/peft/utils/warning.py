"""The warning, under upstream's path."""

from ..core.errors import PeftWarning

__all__ = ["PeftWarning"]
