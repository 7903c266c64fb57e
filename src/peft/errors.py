"""The errors of this library, each named for what the caller can do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftError(Exception):
    """What all errors of this library's own have in common."""


class PeftWarning(UserWarning):
    """A warning of this library's own."""


class Refusal(PeftError, ValueError):
    """A combination that mathematics or the base's format rules out; raised before anything changes."""

    def __init__(self, method: str, layer: str, reason: str) -> None:
        super().__init__(f"{method} on {layer}: {reason}")
        self.method, self.layer, self.reason = method, layer, reason


class NoMatchingPeftModuleError(PeftError, ValueError):
    """A target pattern that matches no module or parameter of the model."""


class CheckpointError(PeftError, RuntimeError):
    """An adapter file that does not fit the model it is loaded into, or that cannot be read."""


def near(name: str, known: Iterable[str], n: int = 3) -> str:
    """`" Did you mean 'q_proj'?"`, or `""` when nothing is close."""
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=n, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
