"""Names of targets against paths: whole paths, their last components, regular expressions; values by pattern."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from ...contract.tree import without_wrappers

V = TypeVar("V")


def means(pattern: str, path: str) -> bool:
    """Whether a target name means this path: the whole path or its last components."""
    pattern = without_wrappers(pattern)
    return path == pattern or path.endswith("." + pattern)


def matcher(patterns: Collection[str] | str | None) -> Callable[[str], bool]:
    """Whether a path is among the target names, or the regular expression fits all of it."""
    if not patterns:
        return lambda path: False
    if isinstance(patterns, str):
        fits = re.compile(patterns).fullmatch
        return lambda path: fits(path) is not None
    names = [without_wrappers(p) for p in patterns]
    whole, ends = frozenset(names), tuple(f".{n}" for n in names)
    return lambda path: path in whole or path.endswith(ends)


def matches(patterns: Collection[str] | str | None, path: str) -> bool:
    return matcher(patterns)(path)


def for_path(patterns: Mapping[str, V] | None, path: str, default: V) -> V:
    """The value of the first pattern (a name, path or regex) that matches a path, else the default.

    One matrix of a stack, `experts.down_proj[3]`, goes by the name of its stack.
    """
    if not patterns:
        return default
    path = path.partition("[")[0] if path.endswith("]") else path
    for pattern, value in patterns.items():
        if means(pattern, path) or re.fullmatch(rf"(.*\.)?(?:{pattern})", path):
            return value
    return default


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
