"""What a config's values may be: checked against the annotations of its fields, and made what JSON can hold.

A value is first made plain (numbers, arrays and tensors of any library, paths, enums and containers become Python's
own), then held against the annotation. An annotation is read once per class.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import math
import os
import reprlib
import sys
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AnySet
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, Union, get_args, get_origin

from .errors import ConfigError

Check: TypeAlias = Callable[[object], object]  # the value as the config holds it, or Unfit
SIMPLE = frozenset((str, int, float, bool, type(None)))
LEAST, LARGEST = -(2**63), 2**64  # seeds reach as far, and no size comes near

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
shown = _short.repr  # any value in a message: bounded, and with what would steer a terminal escaped


class Unfit(Exception):
    """A value that an annotation does not allow. where: the item that is wrong, as `[3]` or `['q_proj']`."""

    def __init__(self, said: str, value: object, where: str = "") -> None:
        super().__init__(said)
        self.said, self.value, self.where = said, value, where


# -- plain values -----------------------------------------------------------------------------------------------------------
def plain(value: object) -> object:
    """The value in Python's own types, where it has a meaning in them; anything else as it is."""
    if type(value) in SIMPLE:
        return value
    if isinstance(value, enum.Enum):
        return plain(value.value)
    for kind in (str, int, float):  # also numpy's, which derive from them
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if isinstance(value, AnySet):
        return set(map(plain, value))
    if callable(listed := getattr(value, "tolist", None)) and not isinstance(value, type):
        try:
            return plain(listed())  # arrays, tensors, and their scalars
        except Exception as e:
            raise Unfit(f"a plain value ({type(e).__name__}: {e})", value) from e
    if isinstance(value, (Sequence, Collection)) and not isinstance(value, (bytes, bytearray, memoryview, type)):
        return list(map(plain, value))
    return value


# -- checks of plain values -----------------------------------------------------------------------------------------------
def _bool(value: object) -> object:
    if type(value) is bool:
        return value
    if type(value) is int and value in (0, 1):
        return bool(value)
    raise Unfit("True or False", value)


def _int(value: object) -> object:
    if type(value) is float and value.is_integer():
        value = int(value)  # 8.0, as some writers of JSON have it
    if type(value) is not int:
        raise Unfit("an integer", value)
    if not LEAST <= value < LARGEST:
        raise Unfit("an integer of 64 bits", value)
    return value


def _float(value: object) -> object:
    if type(value) not in (int, float):
        raise Unfit("a number", value)
    assert isinstance(value, (int, float))
    if not LEAST <= value < LARGEST if type(value) is int else not math.isfinite(value):
        raise Unfit("a finite number", value)
    return value


def _str(value: object) -> object:
    if type(value) is not str:
        raise Unfit("a string", value)
    return value


def _none(value: object) -> object:
    if value is not None:
        raise Unfit("None", value)
    return value


def _storable(value: object) -> object:
    """Anything that comes back from JSON as it went."""
    if type(value) is float:
        return _float(value)
    if type(value) in SIMPLE:
        return value
    if isinstance(value, dict):
        return {_at(f" key {shown(k)}", _str, k): _at(f"[{shown(k)}]", _storable, v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_at(f"[{i}]", _storable, v) for i, v in enumerate(_ordered(value))]
    raise Unfit("a value that can be stored as JSON", value)


def _at(where: str, check: Check, value: object) -> Any:
    try:
        return check(value)
    except Unfit as e:
        raise Unfit(e.said, e.value, where + e.where) from None


def _ordered(values: Collection[object]) -> Collection[object]:
    if not isinstance(values, set):
        return values
    return sorted(values, key=lambda v: (str(type(v)), v if type(v) in SIMPLE else repr(v)))


# -- checks by annotation -------------------------------------------------------------------------------------------------
class Least(NamedTuple):
    """In `Annotated[int, Least(1)]`: the number is at least so much."""

    number: float


AtLeast0: TypeAlias = Annotated[int, Least(0)]
AtLeast1: TypeAlias = Annotated[int, Least(1)]
WORDS: dict[Check, str] = {_bool: "a boolean", _int: "an integer", _float: "a number", _str: "a string", _none: "None"}
BASIC: dict[object, Check] = {bool: _bool, int: _int, float: _float, str: _str, type(None): _none, None: _none}


def said_of(annotation: object) -> str:
    """An annotation in a message."""
    check = BASIC.get(annotation) if _hashable(annotation) else None
    if check is not None:
        return WORDS[check]
    args = get_args(annotation)
    origin = get_origin(annotation) or annotation
    if origin is Annotated:
        return said_of(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(said_of, args)))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (list, set, tuple, Sequence, Collection, AnySet):
        inner = dict.fromkeys(said_of(a) for a in args if a is not Ellipsis)
        return (
            f"a {'pair' if origin is tuple and len(args) == 2 else 'list'} of ({', '.join(inner)})"
            if inner
            else "a list"
        )
    if origin in (dict, Mapping):
        return f"a dictionary from ({said_of(args[0])}) to ({said_of(args[1])})" if args else "a dictionary"
    return getattr(annotation, "__name__", None) or str(annotation)


def _hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def check_of(annotation: object) -> Check:
    """The check that an annotation asks for; whatever can be stored where it is no annotation that is known here."""
    return _check_of(annotation) if _hashable(annotation) else _storable


@functools.lru_cache(maxsize=512)
def _check_of(annotation: object) -> Check:
    if annotation in BASIC:
        return BASIC[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _least(check_of(args[0]), next((a.number for a in args[1:] if isinstance(a, Least)), -math.inf))
    if origin is Literal:
        return _literal(args)
    if origin in (Union, types.UnionType):
        return _union(args, said_of(annotation))
    kind = origin or annotation
    if kind is tuple and args and Ellipsis not in args:
        return _tuple(tuple(map(check_of, args)), said_of(annotation))
    if kind in (list, set, tuple, Sequence, Collection, AnySet):
        held = {set: set, AnySet: set, tuple: tuple}.get(kind, list)
        return _items(held, check_of(args[0]) if args else _storable, said_of(annotation))
    if kind in (dict, Mapping):
        key, item = map(check_of, args) if args else (_str, _storable)
        return _dict(key, item, said_of(annotation))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _enum(annotation)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return _dataclass(annotation)
    if isinstance(annotation, type) and annotation is not object:
        return _instance(annotation)
    return _storable


def _least(number: Check, least: float) -> Check:
    def check(value: object) -> object:
        found: Any = number(value)
        if found < least:
            raise Unfit(f"at least {least}", value)
        return found

    return check


def _literal(allowed: tuple[object, ...]) -> Check:
    def check(value: object) -> object:
        for one in allowed:
            if one == value and type(one) is type(value):
                return value
        raise Unfit(" or ".join(map(repr, allowed)), value)

    return check


def _union(args: tuple[object, ...], said: str) -> Check:
    checks = [check_of(a) for a in args]

    def check(value: object) -> object:
        inside: Unfit | None = None
        converted: list[object] = []
        for one in checks:
            try:
                found = one(value)
            except Unfit as e:
                inside = e if e.where else inside
                continue
            if type(found) is type(value):
                return found
            converted.append(found)
        if converted:
            return converted[0]
        raise inside or Unfit(said, value)

    return check


def _items(held: Callable[[Any], object], item: Check, said: str) -> Check:
    def check(value: object) -> object:
        if not isinstance(value, (list, tuple, set)):
            raise Unfit(said, value)
        found = []
        for i, v in enumerate(value if held is set else _ordered(value)):
            try:
                found.append(item(v))
            except Unfit as e:
                raise Unfit(e.said, e.value, f"[{i}]{e.where}") from None
        return held(found)

    return check


def _tuple(checks: tuple[Check, ...], said: str) -> Check:
    def check(value: object) -> object:
        if not isinstance(value, (list, tuple)) or len(value) != len(checks):
            raise Unfit(said, value)
        return tuple(_at(f"[{i}]", c, v) for i, (c, v) in enumerate(zip(checks, value)))

    return check


def _dict(key: Check, item: Check, said: str) -> Check:
    def check(value: object) -> object:
        if not isinstance(value, dict):
            raise Unfit(said, value)
        return {_at(f" key {shown(k)}", key, k): _at(f"[{shown(k)}]", item, v) for k, v in value.items()}

    return check


def _enum(options: type[enum.Enum]) -> Check:
    def check(value: object) -> object:
        try:
            return options(value)
        except ValueError:
            raise Unfit(" or ".join(repr(o.value) for o in options), value) from None

    return check


def _dataclass(kind: type) -> Check:
    names = {f.name for f in dataclasses.fields(kind) if f.init}

    def check(value: object) -> object:
        if isinstance(value, kind):
            return value
        if isinstance(value, dict) and names.issuperset(value):
            return kind(**value)
        raise Unfit(f"a {kind.__name__}", value)

    return check


def _instance(kind: type) -> Check:
    def check(value: object) -> object:
        if not isinstance(value, kind):
            raise Unfit(f"a {kind.__name__}", value)
        return value

    return check


# -- of a class -----------------------------------------------------------------------------------------------------------
def annotations_of(cls: type) -> dict[str, object]:
    """The annotations of a dataclass's fields, evaluated; `object` for one that names what its module has not at run time."""
    found: dict[str, object] = {}
    for base in reversed(cls.__mro__):
        scope = vars(sys.modules.get(base.__module__, types))
        for name, annotation in inspect.get_annotations(base).items():
            if isinstance(annotation, str):
                try:
                    annotation = eval(annotation, dict(scope))
                except Exception:
                    annotation = object
            found[name] = annotation
    return {f.name: found[f.name] for f in dataclasses.fields(cls)}


def fitting(check: Check, cls: type, name: str, value: object) -> object:
    """The value as the config holds it. Raises ConfigError, naming class, field and value."""
    try:
        return check(value if type(value) in SIMPLE else plain(value))
    except Unfit as e:
        where, said, value = e.where, e.said, e.value
    except RecursionError:
        where, said = "", "a value that can be stored as JSON: this one is nested without end"
    what = f"{name}{where}" if where else f"`{name}`"
    raise ConfigError(
        f"{cls.__name__}: {what} should be {said} but the value passed is {shown(value)} ({type(value).__name__})"
    )
