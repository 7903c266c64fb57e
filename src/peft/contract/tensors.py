"""What a method keeps, as data: of each tensor, how it is made, where a file holds it, how it is joined and shown.

A method states `tensors = {attribute: Stored(...)}` once per class; `TensorTable` is the same by use, made once per class and
never per site. Methods whose tensors depend on the site (trained copies) make a table of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from torch import Tensor

SIZES = ("out", "fan_in", "inputs", "width", "groups", "kernel")  # of the site's geometry
Shape = tuple[int, ...]
# Upstream's names stand for dictionaries by adapter, which the layer shows: nothing inside it has an attribute of such a
# name, or code that looks for layers by it would find this, too. A tensor adds what it is to the name, a tree this.
COPY = "_copy"


@dataclass(frozen=True)
class Stored:
    """One tensor of a method.

    key: its name below the site's path in the file; "" is the attribute's own. indexed: its key where the layer looks
    rows up (an embedding).
    shape: words for its sizes in memory, `"r fan_in"`: sizes of the geometry (`SIZES`), numbers, attributes of the
    method; "" where the method makes it by itself. when: what must be true for it to be made, an attribute path of the
    method (`"config.use_bias"`).
    disk: words for its shape in the file where it differs: numbers (one of them -1) and attributes. kernel: the same for
    layers that have a kernel, with `taps`, the native kernel sizes, and `ones`, as many ones.
    frozen: it never trains. shared: one tensor for all sites, whose key stands below the model.
    shrinks, grows: the axis of which a file may hold less, or more.
    join: how those of several matrices become that of the matrix made of them one above the other, "rows" (one below the
    other) or "blocks" (along a diagonal). stack: in the file of a stack of matrices (experts), the axis of the matrix's
    number, and the axis that is then joined with the next; None: the number comes first. turned: the attribute that holds
    its transpose in a file about ΔWᵀ.
    module: upstream keeps it in a module of its own, though its key does not say so.
    """

    key: str = ""
    shape: str = ""
    when: str = ""
    disk: str = ""
    kernel: str = ""
    indexed: str = ""
    frozen: bool = False
    shared: bool = False
    shrinks: int | None = None
    grows: int | None = None
    join: str = ""
    stack: tuple[int, int] | None = None
    turned: str = ""
    module: bool = False


@dataclass(frozen=True)
class Shown:
    """What upstream's layers show of a method, by adapter, besides its tensors.

    settings: upstream's names. paths: the attribute path of those that are called otherwise here. assignable: those that
    are read in every forward. layer: upstream's name of the layer in reports, with the base's class as {}. dropout: upstream's name of the module that is `Method.dropout` here. empty: names of
    further tensors that upstream's layer has, empty where none is held.
    """

    settings: tuple[str, ...] = ()
    paths: Mapping[str, str] = field(default_factory=dict)
    assignable: tuple[str, ...] = ()
    dropout: str = ""
    empty: tuple[str, ...] = ()
    layer: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.settings, *([self.dropout] if self.dropout else []))


@dataclass(frozen=True, eq=False)
class TensorTable:
    """The tensors of a class, by use."""

    keys: Mapping[str, str] = field(default_factory=dict)  # attribute path -> key below the site's path
    shared_keys: Mapping[str, str] = field(default_factory=dict)  # attribute path -> key below the model
    own: Mapping[str, str] = field(default_factory=dict)  # those of `keys` that are not another method's within
    frozen: tuple[str, ...] = ()
    unwritten: tuple[str, ...] = ()  # a file may hold them, but they are another site's to save
    repeats: tuple[str, ...] = ()  # starts of keys under which a file may hold a site's tensors once more
    lent: Mapping[str, str] = field(default_factory=dict)  # attribute path -> key: another site's tensors, shown here
    modules: tuple[str, ...] = ()
    also_shown: tuple[str, ...] = ()  # names that upstream's layer has beside these, empty where none is held
    joins: Mapping[str, str] = field(default_factory=dict)  # key -> how; {}: it cannot hold what several matrices have
    stacks: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # by key
    turned: Mapping[str, str] = field(default_factory=dict)  # key -> key
    flexible: tuple[tuple[str, int, bool], ...] = ()  # (attribute, axis, whether a file may hold more of it)
    made: tuple[tuple[str, Callable[[Any], Shape], Callable[[Any], Any] | None], ...] = ()
    disk: Mapping[str, str] = field(default_factory=dict)  # attribute path -> words for its shape in the file
    kernel: Mapping[str, str] = field(default_factory=dict)  # the same for layers that have a kernel
    source: tuple[Mapping[str, Stored], tuple[str, ...]] | None = None  # what it was made of

    def __deepcopy__(self, memo: object) -> TensorTable:
        return self  # nothing in it changes

    @classmethod
    def of(cls, tensors: Mapping[str, Stored], also_shown: tuple[str, ...] = (), indexed: bool = False) -> TensorTable:
        """indexed: that of `for_rows`."""
        key = {a: (s.indexed if indexed and s.indexed else s.key) or a for a, s in tensors.items()}
        keys = {a: key[a] for a, s in tensors.items() if not s.shared}
        looked_up = {a: s for a, s in tensors.items() if s.indexed}
        heads = [head_of(s.key or a) for a, s in looked_up.items()] + [head_of(s.indexed) for s in looked_up.values()]
        return cls(
            keys=keys,
            shared_keys={a: key[a] for a, s in tensors.items() if s.shared},
            own=keys,
            frozen=tuple(a for a, s in tensors.items() if s.frozen),
            modules=tuple(a for a, s in tensors.items() if s.module),
            also_shown=(*heads, *also_shown),
            joins={key[a]: s.join for a, s in tensors.items() if s.join},
            stacks={key[a]: s.stack for a, s in tensors.items() if s.stack},
            turned={key[a]: key[s.turned] for a, s in tensors.items() if s.turned},
            flexible=tuple(
                (a, axis, more)
                for a, s in tensors.items()
                for axis, more in ((s.shrinks, False), (s.grows, True))
                if axis is not None
            ),
            made=tuple(
                (a, Sizes(s.shape), attrgetter(s.when) if s.when else None) for a, s in tensors.items() if s.shape
            ),
            disk={a: s.disk for a, s in tensors.items() if s.disk},
            kernel={a: s.kernel or s.disk for a, s in tensors.items() if s.kernel or s.disk},
            source=None if indexed else (tensors, also_shown),
        )

    @functools.cached_property
    def for_rows(self) -> TensorTable:
        """The same for layers that look rows up."""
        return self if self.source is None else TensorTable.of(*self.source, indexed=True)

    def disk_shape(self, method: Any, attr: str) -> Shape | None:
        """The shape of a method's tensor in the file where it differs (one -1); None keeps it."""
        taps = method.geometry.shape
        words = (self.kernel if taps else self.disk).get(attr)
        if words is None:
            return None
        owner, _, _ = attr.rpartition(".")
        return _on_disk(words, taps, attrgetter(owner)(method) if owner else method)

    def without(self, *attributes: str) -> TensorTable:
        """These are made and trained, but no file holds them."""
        return _without(self, attributes)

    def of_another(self, *attributes: str, repeated: bool = False) -> TensorTable:
        """These belong to another site, which saves them. repeated: a file may hold them here once more all the same,
        which is passed over; else what a file holds of them is read."""
        return _of_another(self, attributes, repeated)

    def around(self, own: Mapping[str, Stored]) -> TensorTable:
        """That of a method which wraps the one of this table as its attribute `inner`."""
        return _around(self, tuple(own.items()))

    def layer_names(self) -> tuple[str, ...]:
        """Upstream's names of the tensors, as its layers list them."""
        held = (*self.own.values(), *self.lent.values())
        return tuple(dict.fromkeys((*map(head_of, held), *self.also_shown)))


def head_of(key: str) -> str:
    return key.partition(".")[0]


class Sizes:
    """What gives the shape that some words mean, of a method; looked up in C, because every site of a model asks."""

    def __init__(self, words: str) -> None:
        self.paths = [f"geometry.{w}" if w in SIZES else w for w in words.split()]
        self.numbers = any(p.isdigit() for p in self.paths)
        self.found: Callable[[Any], Any] = attrgetter(*self.paths) if not self.numbers else _nothing

    def __call__(self, method: Any) -> Shape:
        if self.numbers:
            return tuple(int(p) if p.isdigit() else attrgetter(p)(method) for p in self.paths)
        found = self.found(method)
        return found if len(self.paths) > 1 else (found,)


def _nothing(method: Any) -> Shape:
    return ()


def _on_disk(words: str, taps: Shape, method: Any) -> Shape:
    out: list[int] = []
    for word in words.split():
        if word in ("taps", "ones"):
            out += taps if word == "taps" else (1 for _ in taps)
        else:
            out.append(int(word) if word.lstrip("-").isdigit() else getattr(method, word))
    return tuple(out)


@functools.lru_cache(maxsize=256)
def _without(table: TensorTable, attributes: tuple[str, ...]) -> TensorTable:
    keys, shared = ({a: k for a, k in t.items() if a not in attributes} for t in (table.keys, table.shared_keys))
    return replace(table, keys=keys, own=keys, shared_keys=shared, source=None)


@functools.lru_cache(maxsize=256)
def _of_another(table: TensorTable, attributes: tuple[str, ...], repeated: bool) -> TensorTable:
    if not repeated:
        return replace(table, unwritten=attributes, source=None)
    keys = {a: table.keys[a] for a in attributes}
    return replace(_without(table, attributes), repeats=tuple(keys.values()), lent=keys, source=None)


@functools.lru_cache(maxsize=256)
def _around(inner: TensorTable, own: tuple[tuple[str, Stored], ...]) -> TensorTable:
    outer = TensorTable.of(dict(own))

    def within(names: Mapping[str, Any]) -> dict[str, Any]:
        return {f"inner.{a}": value for a, value in names.items()}

    return replace(
        inner,
        keys={**within(inner.keys), **outer.keys},
        shared_keys=within(inner.shared_keys),
        own=outer.own,
        frozen=(*(f"inner.{a}" for a in inner.frozen), *outer.frozen),
        unwritten=tuple(f"inner.{a}" for a in inner.unwritten),
        modules=outer.modules,
        also_shown=(),
        joins={**inner.joins, **outer.joins} if inner.joins else {},
        flexible=tuple((f"inner.{a}", axis, more) for a, axis, more in inner.flexible),
        made=outer.made,
        disk={**within(inner.disk), **outer.disk},
        kernel={**within(inner.kernel), **outer.kernel},
        source=None,
    )


def fit_to_file(parameter: Tensor, stored: Tensor | None, axis: int, more: bool) -> None:
    """Take over a file's size along one axis, where it is smaller (or, with `more`, larger)."""
    if stored is None or stored.dim() != parameter.dim():
        return
    here, there = list(parameter.shape), list(stored.shape)
    own, size = here.pop(axis), there.pop(axis)
    if here != there or own == size or (size > own) is not more:
        return
    data = parameter.data
    parameter.data = data.new_empty(stored.shape) if more else data.narrow(axis, 0, size).clone()
