"""The fields of configs: which are whose, and what their values may be, stated where a field is declared."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import field
from typing import Any, TypeVar

from .config_values import annotations_of, check_of, fitting, shown
from .errors import ConfigError

OFF = (bool, int, str, list, tuple, dict, type(None))  # of which the empty or false value means: not asked for
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


def reading(read: Callable[[Any, Any], Any], default: Any = None, *, own: bool = False) -> Any:
    """A field whose values are read by `read(config class, value)`, which raises where there is no reading them."""
    return field(default=default, metadata={"read": read, "own": own})


def checks_of(cls: type) -> dict[str, Callable[[object], object]]:
    """For each field of a config class: the value as the config holds it, or ConfigError."""
    found: dict[str, Callable[[object], object]] | None = cls.__dict__.get("_checks")
    if found is None:
        annotations = annotations_of(cls)
        found = {f.name: _field_check(cls, f, annotations[f.name]) for f in dataclasses.fields(cls)}
        type.__setattr__(cls, "_checks", found)
    return found


def _field_check(cls: type, f: dataclasses.Field[Any], annotation: object) -> Callable[[object], object]:
    check, said, name = check_of(annotation), f.metadata, f.name
    typed = functools.partial(fitting, check, cls, name)
    may_be_none = f.default is None

    def full(value: object) -> object:
        if value is None and may_be_none:
            return None
        if "unavailable" in said:
            if _same(value, said["unavailable"]):  # off, in whatever way a file writes that
                return list(value) if isinstance(value, tuple) else value
            raise ConfigError(
                f"{cls.__name__}.{name}={shown(value)} asks for a feature that is not available here; only the default "
                f"{said['unavailable']!r} is accepted."
            )
        value = typed(value)
        if "range" in said:
            in_range(name, value, *said["range"])
        if "allowed" in said:
            among_these(name, value, said["allowed"])
        if "enum" in said:
            value = _member(said["enum"], name, value)
        return said["read"](cls, value) if "read" in said else value

    return full if may_be_none or said.keys() - {"own", "transient"} else typed


def _member(options: type[enum.Enum], name: str, value: object) -> enum.Enum:
    try:
        return options(value)
    except ValueError:
        known = ", ".join(o.value for o in options)
        raise ConfigError(f"`{name}` should be one of {known} but the value passed is {shown(value)}") from None


def in_range(name: str, value: Any, least: float = 1, below: float | None = None) -> None:
    """Raise a clear error unless `least <= value` (`< below`)."""
    if value is None or value < least:
        raise ConfigError(f"`{name}` should be at least {least} but the value passed is {shown(value)}")
    if below is not None and value >= below:
        raise ConfigError(f"`{name}` should be less than {below} but the value passed is {shown(value)}")


def among_these(name: str, value: object, allowed: Collection[object]) -> None:
    """Raise a clear error unless the value is one of the `allowed`."""
    if value not in allowed:
        raise ConfigError(
            f"`{name}` should be one of {', '.join(map(repr, allowed))} but the value passed is {shown(value)}"
        )


def default_of(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _same(value: object, default: object) -> bool:
    return (type(value) is type(default) and value == default) or (type(value) in OFF and not value and not default)


class Names(set[str]):
    """A set of names that is gone through in their order, so that every process does the same."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(super().__iter__()))

    def __repr__(self) -> str:
        return "{" + ", ".join(map(repr, self)) + "}" if self else "set()"


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
