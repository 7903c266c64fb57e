"""The places of a base model: its modules by path, seen through the wrappers of adapters, and the kind of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ...contract.kind import LayerKind
from ...contract.tree import AdapterContainer, Composite, Wrapper, wraps_as
from ...registry import WHEN_KINDS_CHANGE, kinds
from ..acting.adapted_layer import AdaptedLayer


@dataclass(slots=True)
class Place:
    """One place of the base model's tree: where a module hangs, wrapped or not."""

    path: str
    parent: nn.Module
    attr: str
    disk_path: str  # the path as upstream writes it to disk
    owner: Place | None = None  # for a part: where its composite stands or will stand
    composite: Composite | None = None
    _kind: LayerKind | None = None
    _module: nn.Module | None = None

    @property
    def kind(self) -> LayerKind:
        """The kind of the base layer there."""
        if self._kind is None:
            held = self.held
            self._kind = held.kind if isinstance(held, AdaptedLayer) else kind_of(self.module)
        return self._kind

    @property
    def module(self) -> nn.Module:
        """The base layer, without any wrapper."""
        if self._module is None:
            held = self.held
            while isinstance(held, Wrapper):
                held = held.base_layer
            self._module = held
        return self._module

    @property
    def held(self) -> nn.Module:
        return self.parent._modules[self.attr]  # type: ignore[return-value]

    @property
    def adapted(self) -> AdaptedLayer | None:
        return held if isinstance(held := self.held, AdaptedLayer) else None

    @property
    def key(self) -> tuple[int, str]:
        return (id(self.parent), self.attr)


def walk(model: nn.Module) -> Iterator[Place]:
    """All modules below `model`, by base path; goes through wrappers, torch's too (compiled, checkpointed, FSDP 1).

    A module made of several weights is followed by its parts (of a stand-in that is not installed yet), never by its
    children: it reads their weights raw, so wrapping them would do nothing.
    """
    while (inside := wraps_as(model)) and model._modules[inside] is not None:
        model = model._modules[inside]  # type: ignore[assignment]
    yield from _children(model, "", "")


def _children(module: nn.Module, path: str, disk_path: str) -> Iterator[Place]:
    for attr, child in list(module._modules.items()):
        if child is None or isinstance(child, AdapterContainer):
            continue
        parent, held = module, attr
        while (inside := wraps_as(child)) and (wrapped := child._modules[inside]) is not None:
            parent, held, child = child, inside, wrapped  # torch's wrappers are no step of a path
        place = Place(f"{path}{attr}", parent, held, f"{disk_path}{attr}")
        yield place
        yield from _below(child, place)


def _below(child: nn.Module, place: Place) -> Iterator[Place]:
    if isinstance(child, AdaptedLayer):
        yield from _below(child.base_layer, place)
    elif isinstance(child, Composite):
        yield from parts(child, place)
    elif (kind := splitter_of(child)) is not None and (composite := kind.stand_in(child)) is not None:
        yield from parts(composite, place)
    elif child._modules:
        yield from _children(child, place.path + ".", place.disk_path + ".")


def parts(composite: Composite, place: Place) -> Iterator[Place]:
    for name, part in composite.parts().items():
        path = f"{place.path}.{name}" if name else place.path
        disk_path = f"{place.disk_path}.{part.disk_path}" if part.disk_path else place.disk_path
        yield Place(path, part.parent, part.attr, disk_path, owner=place, composite=composite)


_ASKED: dict[type[nn.Module], list[LayerKind]] = {}
_SPLITTERS: dict[type[nn.Module], list[LayerKind]] = {}
WHEN_KINDS_CHANGE += [_ASKED.clear, _SPLITTERS.clear]


def _candidates(module: nn.Module) -> list[LayerKind]:
    """The kinds that have to be asked about modules of this class: those that look at more than it, up to a taker."""
    asked = []
    for kind in kinds().values():
        if kind.classes and not isinstance(module, kind.classes):
            continue
        if kind.for_parameters or (kind.by_type and not kind.claims(module)):
            continue
        asked.append(kind)
        if kind.by_type:
            break
    return asked


def splitter_of(module: nn.Module) -> LayerKind | None:
    """The kind that claims a module, if it is one of those that put a stand-in of several parts in its place; else
    None, or the kind: what comes after the last such kind is not asked."""
    cls = type(module)
    if cls not in _SPLITTERS:
        asked = _ASKED.setdefault(cls, _candidates(module))
        last = max((i for i, kind in enumerate(asked, 1) if kind.stands_in), default=0)
        _SPLITTERS[cls] = asked[:last]
    for kind in _SPLITTERS[cls]:
        if kind.claims(module):
            return kind
    return None


def kind_of(module: nn.Module) -> LayerKind:
    """The kind that claims a module; the opaque kind claims what no other does."""
    cls = type(module)
    if cls not in _ASKED:
        _ASKED[cls] = _candidates(module)
    for kind in _ASKED[cls]:
        if kind.claims(module):
            return kind
    raise TypeError(f"No layer kind claims {type(module).__name__}")
