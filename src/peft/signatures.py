"""What the forward of a module takes, by its signature."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

from torch import nn


def arguments_of(cls: type[nn.Module]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(cls.forward).parameters)[1:]
    except (TypeError, ValueError):
        return ()


def first_parameter(module: nn.Module) -> str:
    """The name of the first argument of a module's forward: its input where a caller names all arguments."""
    if "forward" not in module.__dict__:
        return _first_argument(type(module).forward, True)
    forward = module.forward
    return _first_argument(getattr(forward, "__func__", forward), hasattr(forward, "__func__"))


@functools.lru_cache(maxsize=256)
def _first_argument(function: Callable[..., Any], bound: bool) -> str:
    try:
        return next(itertools.islice(inspect.signature(function).parameters, int(bound), None), "")
    except (TypeError, ValueError):
        return ""
