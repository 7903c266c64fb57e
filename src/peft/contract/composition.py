"""Methods that act together, by what they act on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .method import Method


class ByForm(NamedTuple):
    """Each list in activation order."""

    before: list[Method]
    replaced: list[Method]
    added: list[Method]  # to the weight: the forms `delta` and `weight`
    after: list[Method]


def by_form(methods: Iterable[Method]) -> ByForm:
    """Those that stand at a layer; methods of the whole model are passed over."""
    found = ByForm([], [], [], [])
    lists = {
        "before": found.before,
        "replace": found.replaced,
        "delta": found.added,
        "weight": found.added,
        "after": found.after,
    }
    for m in methods:
        if (group := lists.get(m.form)) is not None:
            group.append(m)
    return found
