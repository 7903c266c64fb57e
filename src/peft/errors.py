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


class ConfigError(PeftError, ValueError, TypeError):
    """A config's value that its field does not allow: of the wrong type, not finite, out of range, or not storable."""


class CheckpointError(PeftError, RuntimeError):
    """An adapter file that does not fit the model it is loaded into, or that cannot be read."""


class UserError(PeftError, ValueError):
    """Bad input to a run. The message names the thing, what was expected and what to do."""


def near(name: str, known: Iterable[str], n: int = 3) -> str:
    """`" Did you mean 'q_proj'?"`, or `""` when nothing is close."""
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=n, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """What the caller may have meant, as a sentence: near names, or all of them when there are few."""
    names = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known: {', '.join(names)}." if len(names) <= 24 else ""
