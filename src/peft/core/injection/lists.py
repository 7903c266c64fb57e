"""Modules that a model holds a second time, in a plain list or dict of its own, and calls from there.

Such a list is no part of the tree: a wrapper put in the tree alone would never be called, and a merge would change what
the model does. So the list is told, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

OWN = frozenset(nn.Module().__dict__)  # the tables of every module: parameters, children, hooks


def follow(modules: Iterable[nn.Module], replaced: Mapping[int, nn.Module]) -> None:
    """Let plain lists, tuples and dicts of these modules hold, instead of what is replaced (by id), what stands there now."""
    if not replaced:
        return
    for module in modules:
        for name, value in module.__dict__.items():
            if type(value) in (list, tuple, dict) and value and name not in OWN:
                _in(module.__dict__, name, value, replaced)


def _in(fields: dict[str, Any], name: str, value: Any, replaced: Mapping[int, nn.Module]) -> None:
    entries = value.values() if type(value) is dict else value
    if not any(isinstance(v, nn.Module) and id(v) in replaced for v in entries):
        return
    if type(value) is dict:
        value.update({k: replaced.get(id(v), v) for k, v in value.items()})
    elif type(value) is list:
        value[:] = [replaced.get(id(v), v) for v in value]
    else:
        fields[name] = tuple(replaced.get(id(v), v) for v in value)
