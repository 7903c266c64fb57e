"""The warning, under upstream's path."""

from ..errors import PeftWarning

__all__ = ["PeftWarning"]
