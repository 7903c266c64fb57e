"""Views that let code written for upstream read and assign adapter tensors: `layer.lora_A["default"].weight`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .adapted import Adapted


class WeightView:
    """One tensor of one adapter, under the name that upstream gives it."""

    def __init__(self, method: nn.Module, attr: str) -> None:
        object.__setattr__(self, "_at", (method, attr))

    @property
    def weight(self) -> Any:
        method, attr = self._at
        return getattr(method, attr)

    @weight.setter
    def weight(self, value: Any) -> None:
        method, attr = self._at
        setattr(method, attr, value if isinstance(value, nn.Parameter) else nn.Parameter(value))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weight, name)


class AdapterView(Mapping[str, Any]):
    """`adapter name -> value` of one attribute over the adapters of a layer."""

    def __init__(self, layer: Adapted, attr: str) -> None:
        self.layer, self.attr = layer, attr

    def _method(self, name: str) -> nn.Module | None:
        held = (n for m in self.layer.methods.get(name, ()) for n in m.nested())
        return next((n for n in held if hasattr(n, self.attr)), None)

    def __getitem__(self, name: str) -> Any:
        method = self._method(name)
        if method is None:
            raise KeyError(name)
        value = getattr(method, self.attr)
        modular = method.keys.get(self.attr, "").endswith(".weight") or self.attr in method.as_modules  # type: ignore[union-attr,operator]
        wrapped = isinstance(value, nn.Parameter) and modular
        return WeightView(method, self.attr) if wrapped else value

    def __setitem__(self, name: str, value: Any) -> None:
        method = self._method(name)
        if method is None:
            raise KeyError(name)
        setattr(method, self.attr, value)

    def __iter__(self) -> Iterator[str]:
        return (n for n in self.layer.methods if self._method(n) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._method(name) is not None


def view(layer: Adapted, attr: str) -> AdapterView | None:
    """The view of a tensor or number that the layer's methods hold, None when none of them has it."""
    for methods in layer.methods.values():
        for m in (inner for outer in methods for inner in outer.nested()):
            if (
                attr in m._parameters
                or attr in m._buffers
                or attr in m._modules
                or attr in getattr(m, "view_attributes", ())
            ):
                return AdapterView(layer, attr)
    return None
