"""The one layer wrapper: a base layer, its kind, and any number of adapters of any methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from ...contract.geometry import Geometry
from ...contract.kind import LayerKind
from ...contract.method import Method
from ...contract.site import Op
from ...contract.tree import AdapterContainer, tree
from ...signatures import first_parameter
from ..acting.roster import Roster
from .calls import Output, move_recorders
from .switch import Switch, escape
from .upstream_layer import UpstreamLayer


class Companions(AdapterContainer, Switch):
    """The companions of one sort at a layer."""

    layer: Adapted

    def __init__(self, layer: Adapted) -> None:
        super().__init__()
        self.roster, self.merged_adapters = layer.roster, []
        self.__dict__["layer"] = layer  # no child of this

    def is_off(self) -> bool:
        return bool(self.layer.switched_off & {"", self.field})

    @property
    def active_adapters(self) -> list[str]:
        return [n for n in self.roster.chosen if any(True for _ in self.of(n))]

    def turn(self, on: bool) -> None:
        self.layer.switch(self.field, on)

    def of(self, name: str) -> Iterator[Method]:
        here = {id(m) for m in self._modules.values()}
        return (m for m in self.layer.methods.get(name, ()) if id(m) in here)

    @property
    def field(self) -> str:
        """The config field that brings them."""
        return next(n[1:] for n, c in self.layer.adapters._modules.items() if c is self)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        self.layer.merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        self.layer.unmerge()

    def delete_adapter(self, adapter_name: str) -> None:
        self.layer.delete_adapter(adapter_name)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Strengths are the targeted layers' alone."""

    def scale_layer(self, scale: float) -> None:
        """See `set_scale`."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """See `set_scale`."""


class Adapted(Switch, UpstreamLayer):
    """A base layer with adapters. Reads which of them act from the model's shared `Roster`."""

    def __init__(self, base_layer: nn.Module, kind: LayerKind, roster: Roster, path: str, geometry: Geometry) -> None:
        super().__init__()
        container = AdapterContainer()
        container.__dict__["layer"] = self  # no child of it
        self._modules.update(base_layer=base_layer, adapters=container)
        self.set(
            kind=kind,
            roster=roster,
            path=path,
            geometry=geometry,
            op=Op(kind, base_layer, geometry),
            former=set(),
            methods={},
            merged_adapters=[],
            record={},
            _kept=None,
            off=None,
            _last=(None, None, ()),
            _input_name=first_parameter(base_layer),
            training=base_layer.training,
        )

    def attach(self, adapter: str, field: str, method: Method) -> None:
        """Hang a method at `adapters.<adapter>`, a companion at `adapters.%<field>.<adapter>` for the config field that brought it."""
        if field and f"%{field}" not in self.adapters._modules:
            self.adapters.put(f"%{field}", Companions(self))
        self._container(field).put(escape(adapter), method)
        held = self.methods  # replaced, never changed: a call in another thread may be reading it
        self.set(methods={**held, adapter: (*held.get(adapter, ()), method)})

    def detach(self, adapter: str) -> None:
        gone = self.methods.get(adapter, ())
        self.set(methods={n: held for n, held in self.methods.items() if n != adapter}, _last=(None, None, ()))
        for m in (inner for outer in gone for inner in outer.nested()):
            self.former.update((*m.table.layer_names(), *m.shown.names))
        for field in ("", *self.brought_by):
            container = self._container(field)
            if escape(adapter) in container._modules:
                container.drop(escape(adapter))
            if field and not container._modules:
                self.adapters.drop(f"%{field}")

    def is_off(self) -> bool:
        return "" in self.switched_off

    @property
    def active_adapters(self) -> list[str]:
        here = self.roster
        return list(here.asked) if self.targeted else [n for n in here.chosen if n in self.methods]

    def turn(self, on: bool) -> None:
        self.switch("", on)

    def of(self, name: str) -> Iterator[Method]:
        return iter(self.methods.get(name, ()))

    def switch(self, field: str, on: bool) -> None:
        """Switch the companions that a config field brought on or off at this layer, or with "" all that hangs here."""
        if self.merged and not on:
            self.unmerge()
        rest = self.switched_off - {field} if on else self.switched_off | {field}
        self.set(off=(self.roster.off_by_layer, rest) if rest else None, _last=(None, None, ()))

    def held(self) -> Iterator[tuple[str, Method]]:
        own = {id(m): m for methods in self.methods.values() for m in methods}
        return ((f"adapters.{n}", own[id(m)]) for n, m in self.adapters.named_modules() if id(m) in own)

    def _container(self, field: str) -> AdapterContainer:
        container = self._modules["adapters"]
        return container._modules[f"%{field}"] if field else container  # type: ignore[union-attr,return-value]

    @property
    def brought_by(self) -> list[str]:
        """The config fields that brought companions here."""
        return [n[1:] for n, m in self.adapters._modules.items() if isinstance(m, Companions)]

    @property
    def targeted(self) -> bool:
        """Whether an adapter's own method hangs here, not only companions; also when nothing hangs here any more."""
        return len(self.brought_by) < len(self.adapters._modules) or not self.adapters._modules

    def __call__(self, *args: object, **kwargs: object) -> Output:
        if self._modules["base_layer"]._forward_hooks:  # type: ignore[union-attr]
            move_recorders(self.base_layer, self)
        return nn.Module.__call__(self, *args, **kwargs)  # looked up anew: tracers put their own there

    def extra_repr(self) -> str:
        return f"kind={self.kind.name}, adapters={list(self.methods)}"


def adapted_layers(model: nn.Module) -> Iterator[Adapted]:
    return (m for m in tree(model, wrappers=True) if isinstance(m, Adapted))
