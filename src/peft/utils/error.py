"""The errors, under upstream's path."""

from ..core.errors import NoMatchingPeftModuleError, PeftError

__all__ = ["NoMatchingPeftModuleError", "PeftError"]
