"""Names of targets against paths: whole paths, their last components, regular expressions; values by pattern.

Patterns come from files, so the work on them is bounded: names are looked up, not tried one by one, and expressions are
matched by an engine that stops at a time.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

import regex

from ...config_values import shown
from ...contract.tree import without_wrappers
from ...errors import ConfigError

V = TypeVar("V")

SECONDS = 4.0  # that matches of one expression, or of one table of them, may take in a minute
LONGEST = 2**17  # characters of an expression
MOST = 2**17  # patterns of a table


def means(pattern: str, path: str) -> bool:
    """Whether a target name means this path: the whole path or its last components."""
    pattern = without_wrappers(pattern)
    return path == pattern or path.endswith("." + pattern)


def endings(path: str) -> Iterator[str]:
    """All names that mean this path."""
    at = 0
    while True:
        yield path[at:]
        at = path.find(".", at) + 1
        if not at:
            return


def matcher(patterns: Collection[str] | str | None, field: str = "a pattern") -> Callable[[str], bool]:
    """Whether a path is among the target names, or the regular expression fits all of it. field: whose they are."""
    if not patterns:
        return lambda path: False
    if isinstance(patterns, str):
        fits = expression(patterns, field)
        return lambda path: fits.run("fullmatch", path) is not None
    names = frozenset(map(without_wrappers, patterns))
    return lambda path: any(end in names for end in endings(path))


def matches(patterns: Collection[str] | str | None, path: str, field: str = "a pattern") -> bool:
    return matcher(patterns, field)(path)


class Budget:
    """How long the matches of a field may take: hostile expressions take for ever on hostile names."""

    def __init__(self, field: str) -> None:
        self.field, self.spent, self.since = field, 0.0, time.monotonic()

    def run(self, fits: regex.Pattern[str], how: str, path: str) -> regex.Match[str] | None:
        start = time.monotonic()
        if start - self.since > 60:
            self.spent, self.since = 0.0, start
        try:
            found: regex.Match[str] | None = getattr(fits, how)(path, timeout=max(SECONDS - self.spent, 1e-3))
        except (TimeoutError, MemoryError, RecursionError):
            raise ConfigError(
                f"{self.field}: matching {shown(fits.pattern)} with {shown(path)} takes longer than {SECONDS:g} s; write a "
                "simpler expression, or a list of names."
            ) from None
        took = time.monotonic() - start
        self.spent += took if took > 1e-3 else 0.0
        return found


class Expression:
    """A regular expression of a config's field."""

    def __init__(self, pattern: str, field: str, budget: Budget | None = None) -> None:
        self.budget = budget or Budget(field)
        try:
            if len(pattern) > LONGEST:
                raise ValueError(f"it has {len(pattern)} characters")
            re.compile(pattern)  # the syntax is that of the standard library
            self.fits = regex.compile(pattern)
        except (re.error, regex.error, ValueError, RecursionError, OverflowError, MemoryError) as e:
            raise ConfigError(f"{field}={shown(pattern)} is no regular expression: {str(e)[:200]}.") from e

    def run(self, how: str, path: str) -> regex.Match[str] | None:
        """how: `match` or `fullmatch`. ConfigError where it takes too long."""
        return self.budget.run(self.fits, how, path)


@functools.lru_cache(maxsize=64)
def expression(pattern: str, field: str) -> Expression:
    """ConfigError unless the pattern is a regular expression."""
    return Expression(pattern, field)


class Table:
    """Patterns in their order: plain names are looked up, all others tried."""

    def __init__(self, patterns: tuple[str, ...], field: str) -> None:
        if len(patterns) > MOST:
            raise ConfigError(f"{field} has {len(patterns)} entries, at most {MOST} are read.")
        budget = Budget(field)
        self.patterns, self.names = patterns, {p: i for i, p in reversed(list(enumerate(patterns)))}
        plain = re.compile(r"\w+(\.\w+)*").fullmatch  # a dot in a name is a dot
        self.tried = [
            (i, Expression(rf"(.*\.)?(?:{p})", field, budget)) for i, p in enumerate(patterns) if not plain(p)
        ]

    def first(self, path: str) -> str | None:
        """The first pattern that is a name of the path, or fits it or its end."""
        best = min((self.names[end] for end in endings(path) if end in self.names), default=len(self.patterns))
        for i, fits in self.tried:
            if i >= best:
                break
            if fits.run("fullmatch", path) is not None:
                return self.patterns[i]
        return self.patterns[best] if best < len(self.patterns) else None


_table = functools.lru_cache(maxsize=16)(Table)


def for_path(patterns: Mapping[str, V] | None, path: str, default: V, field: str = "a pattern") -> V:
    """The value of the first pattern (a name, path or regex) that matches a path, else the default.

    One matrix of a stack, `experts.down_proj[3]`, goes by the name of its stack. field: whose patterns they are.
    """
    if not patterns:
        return default
    path = path.partition("[")[0] if path.endswith("]") else path
    found = _table(tuple(patterns), field).first(path)
    return default if found is None else patterns[found]


def with_value(patterns: Mapping[str, V] | None, path: str, default: V, value: V) -> dict[str, Any]:
    """`patterns` that give this path `value`: by its last name for all paths alike, by the path where that is taken."""
    patterns, leaf = dict(patterns or {}), rf".*\.{path.rpartition('.')[2]}"
    if for_path(patterns, path, default) == value:
        return patterns
    return {path: value, **patterns} if leaf in patterns else {**patterns, leaf: value}


def to_patterns(values: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """(default, patterns) from which `for_path` gives each of these paths its value."""
    found = list(values.values())
    default = max(set(found), key=found.count)
    other = {p for p, v in values.items() if v != default}
    clash = {p for p in values if any(p.endswith(f".{o}") for o in other)}  # patterns match the ends of paths
    return default, {p: values[p] for p in sorted(other | clash, key=lambda p: -len(p))}
