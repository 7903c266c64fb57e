"""The fields of configs: which are whose, and what their values may be, stated where a field is declared."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Collection
from dataclasses import field
from typing import Any, TypeVar

T = TypeVar("T")
E = TypeVar("E", bound=enum.Enum)


def unavailable(default: Any = None) -> Any:
    """A field that upstream knows and this library has not built: accepted at its default, refused otherwise."""
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: copy.copy(default), metadata={"unavailable": default})
    return field(default=default, metadata={"unavailable": default})


def own_field(default: T) -> T:
    """A field that upstream does not know: written to JSON only when it differs from its default."""
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: copy.copy(default), metadata={"own": True})
    return field(default=default, metadata={"own": True})


def ranged(default: T, least: float = 1, below: float | None = None, *, own: bool = False) -> T:
    """A number with `least <= value` (`< below`); None only where that is the default. own: as `own_field`."""
    return field(default=default, metadata={"range": (least, below), "own": own})


def among(default: T, allowed: Collection[object], *, own: bool = False) -> T:
    """One of the `allowed` values."""
    return field(default=default, metadata={"allowed": allowed, "own": own})


def member(default: E) -> E | str:
    """A member of the default's enum, as itself or by its value; the config holds the member."""
    return field(default=default, metadata={"enum": type(default)})


def check_field(config: Any, f: dataclasses.Field[Any]) -> None:
    """Raise a clear error where a config's value is not what the field's declaration allows; take what it means."""
    value, said = getattr(config, f.name), f.metadata
    if "unavailable" in said and not _same(value, said["unavailable"]):
        raise ValueError(
            f"{type(config).__name__}.{f.name}={value!r} asks for a feature that is not available here; only the default "
            f"{said['unavailable']!r} is accepted."
        )
    if "range" in said and not (value is None and f.default is None):
        require(config, f.name, *said["range"])
    if "allowed" in said:
        one_of(config, f.name, said["allowed"])
    if "enum" in said:
        setattr(config, f.name, _member(said["enum"], f.name, value))


def _member(options: type[enum.Enum], name: str, value: object) -> enum.Enum:
    try:
        return options(getattr(value, "value", value))
    except ValueError:
        known = ", ".join(o.value for o in options)
        raise ValueError(f"`{name}` should be one of {known} but the value passed is {value!r}") from None


def require(config: object, name: str, least: float = 1, below: float | None = None) -> None:
    """Raise a clear error unless `least <= config.name` (`< below`)."""
    value = getattr(config, name)
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)) or value < least:
        raise ValueError(f"`{name}` should be at least {least} but the value passed is {value}")
    if below is not None and value >= below:
        raise ValueError(f"`{name}` should be less than {below} but the value passed is {value}")


def one_of(config: object, name: str, allowed: Collection[object]) -> None:
    """Raise a clear error unless `config.name` is one of the `allowed` values."""
    value = getattr(config, name)
    if value not in allowed:
        raise ValueError(f"`{name}` should be one of {', '.join(map(repr, allowed))} but the value passed is {value!r}")


def default_of(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _same(value: object, default: object) -> bool:
    return value == default or (not value and not default)


def jsonable(value: object) -> object:
    """The value as JSON can hold it: enums by their value, sets sorted, dataclasses as dictionaries."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    return value
