"""Methods and layer kinds are discovered from their folders; adding one edits no list.

A method registers itself when its class is created (a class with a `peft_type`), so a file of the user's own works
like one of `peft/methods/`. A layer kind is an instance named `kind` or listed in `kinds` of a module in `peft/layers/`.
"""

from __future__ import annotations

import enum
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from .config_values import shown
from .contract.kind import LayerKind
from .contract.method import Method, declared, listeners
from .errors import near


class Discovered(enum.EnumMeta):
    """An enum whose members come with the method files: asking for one, or for all, imports them."""

    def __getattr__(cls, name: str) -> Any:
        if not name.startswith("_"):
            modules()
            if name in cls._member_map_:
                return cls._member_map_[name]
        raise AttributeError(f"{cls.__name__} has no member {name!r}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        modules()
        return super().__call__(*args, **kwargs)

    def __getitem__(cls, name: str) -> Any:
        modules()
        return super().__getitem__(name)

    def __contains__(cls, member: Any) -> bool:
        modules()
        return super().__contains__(member)

    def __iter__(cls) -> Iterator[Any]:
        modules()
        return super().__iter__()

    def __reversed__(cls) -> Iterator[Any]:
        modules()
        return super().__reversed__()

    def __len__(cls) -> int:
        modules()
        return super().__len__()

    def __dir__(cls) -> list[str]:
        modules()
        return super().__dir__()

    @property
    def __members__(cls) -> Any:
        modules()
        return super().__members__


class PeftType(str, enum.Enum, metaclass=Discovered):
    """The names of the methods, one member per registered method."""


class TaskType(str, enum.Enum):
    """What the base model is for."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


_METHODS: dict[str, type[Method]] = {}
_COMPANIONS: dict[str, type[Method]] = {}
_WRAPPERS: dict[str, type[Method]] = {}
_EXTRA_KINDS: list[LayerKind] = []
WHEN_KINDS_CHANGE: list[Callable[[], None]] = []  # what was remembered of the kinds is forgotten


def _add_member(name: str) -> None:
    if name in PeftType._member_map_:
        return
    member: Any = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member


def register_method(cls: type[Method]) -> None:
    """Called for every Method class; a later class of the same `peft_type` replaces the earlier.

    The library's own classes come first, so that a class of the user's replaces one of them and not the reverse.
    """
    if not cls.__module__.startswith("peft."):
        modules()
    if cls.__dict__.get("peft_type"):
        _METHODS[cls.peft_type] = cls
        _add_member(cls.peft_type)
    if cls.__dict__.get("companion"):
        _COMPANIONS[cls.__dict__["companion"]] = cls
    if cls.__dict__.get("wraps"):
        _WRAPPERS[cls.__dict__["wraps"]] = cls


def forget_method(peft_type: str) -> None:
    """Take a method out of the registry (its name stays a member of `PeftType`)."""
    _METHODS.pop(peft_type, None)


def register_kind(kind: LayerKind) -> None:
    """Add a layer kind of one's own; kinds are asked in the order of their `priority`."""
    _EXTRA_KINDS.append(kind)
    kinds.cache_clear()
    for forget in WHEN_KINDS_CHANGE:
        forget()


@functools.cache
def modules() -> tuple[ModuleType, ...]:
    """The method files, imported, and with them what any config can bring along or put around a delta."""
    found = _load("methods")
    for folder in ("companions", "variants"):
        _load(folder)
    return found


def _load(folder: str) -> tuple[ModuleType, ...]:
    package = importlib.import_module(f"peft.{folder}")
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    return tuple(importlib.import_module(f"peft.{folder}.{name}") for name in names)


def methods() -> dict[str, type[Method]]:
    """`peft_type -> Method class`."""
    modules()
    return dict(_METHODS)


def companions() -> dict[str, type[Method]]:
    """`config field -> Method class` that the field brings along with any other method (modules_to_save, …)."""
    modules()
    return dict(_COMPANIONS)


def wrappers() -> dict[str, type[Method]]:
    """`config field -> Method class` that the field puts around any delta (DoRA)."""
    modules()
    return dict(_WRAPPERS)


def method(peft_type: str | None) -> type[Method]:
    name = getattr(peft_type, "value", peft_type)
    known = methods()
    if name not in known:
        raise ValueError(
            f"Unknown method {shown(name)}. Known: {', '.join(sorted(known))}.{near(str(name)[:80], known)}"
        )
    return known[name]


@functools.cache
def kinds() -> dict[str, LayerKind]:
    """`name -> layer kind`, the most specific first."""
    found: list[LayerKind] = list(_EXTRA_KINDS)
    for module in _load("layers"):
        found += getattr(module, "kinds", [])
    return {k.name: k for k in sorted(found, key=lambda k: -k.priority)}


def _follow() -> None:
    """Register each new class as it is made, and those that exist: last here, as one of the user's asks for all files."""
    listeners.append(register_method)
    for cls in tuple(declared):
        register_method(cls)


_follow()
