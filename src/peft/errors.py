"""The errors of this library, each named for what the caller can do about it."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import re
from collections.abc import Iterable, Iterator

LONGEST_TEXT = 20_000  # characters of a message
LONGEST_NAME = 200  # characters of a name for which near ones are looked for
MOST_NAMES = 5_000  # among how many

_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A message's text as a terminal may show it: control characters, which names in a file may hold, as escapes; and
    not longer than a person reads."""
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]} … ({len(text)} characters)"
    return _UNSEEN.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


class PeftError(Exception):
    """What all errors of this library's own have in common."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(a) if isinstance(a, str) else a for a in args))


@contextlib.contextmanager
def about_a_file(source: str) -> Iterator[None]:
    """Within, what a file says is used. An error that a value of it runs into, and that names nothing, becomes a
    CheckpointError about the file; in all messages names from the file are shown as `printable` does."""
    try:
        yield
    except PeftError:
        raise
    except (KeyError, IndexError, AttributeError, TypeError, ArithmeticError, RecursionError, MemoryError) as e:
        raise CheckpointError(f"{source} cannot be used here ({type(e).__name__}: {e}).") from e
    except RuntimeError as e:
        if type(e) is not RuntimeError:  # torch.OutOfMemoryError and others that callers know
            raise
        raise CheckpointError(f"{source} cannot be used here: {e}") from e
    except ValueError as e:
        if type(e) is ValueError:
            e.args = tuple(printable(a) if isinstance(a, str) else a for a in e.args)
        raise


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
    close = _close(name, known, n)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """What the caller may have meant, as a sentence: near names, or all of them when there are few."""
    names = [str(k) for k in known]
    close = _close(str(name), names, 3)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known: {', '.join(names)}." if len(names) <= 24 else ""


def _close(name: str, known: Iterable[str], n: int) -> list[str]:
    """The known names nearest to one. The work is bounded: names of a file may be long and many."""
    if len(name) > LONGEST_NAME:
        return []
    some = itertools.islice(dict.fromkeys(k for k in known if len(k) <= LONGEST_NAME), MOST_NAMES)
    return difflib.get_close_matches(name, list(some), n=n, cutoff=0.6)
