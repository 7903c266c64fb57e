"""Objects of which a model may have a hundred thousand: cheap modules, and making many without garbage collections."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Self = TypeVar("Self", bound="CheapModule")


class _Later:
    """A container that nearly no module ever uses: made when it is first asked for."""

    def __init__(self, name: str, container: Callable[[], object]) -> None:
        self.name, self.container = name, container

    def __get__(self, module: nn.Module | None, owner: type) -> object:
        return self if module is None else module.__dict__.setdefault(self.name, self.container())


_FIELDS = nn.Module().__dict__


_LATER = {
    k: _Later(k, type(v)) for k, v in _FIELDS.items() if "_dict_" in k or k.endswith(("_kwargs", "_called", "_set"))
}


_FRESH = [(k, type(v) if isinstance(v, dict) else None, v) for k, v in _FIELDS.items() if k not in _LATER]


class CheapModule(nn.Module):
    """A module of which a model may have a hundred thousand.

    The same fields as any nn.Module, whatever this torch gives it, set without the checks that cost most of the time;
    the containers that neither calls nor the tree of modules read come when they are asked for.
    """

    _fresh = _FRESH

    def __init__(self) -> None:
        fields = self.__dict__
        for name, container, value in self._fresh:
            fields[name] = value if container is None else container()

    def set(self, **values: object) -> None:
        """Attributes that are neither parameters, buffers nor modules, all at once."""
        self.__dict__.update(values)

    def train(self: Self, mode: bool = True) -> Self:
        """As nn.Module's, which takes five times as long over a hundred thousand of them."""
        if not isinstance(mode, bool):
            raise ValueError("training mode is expected to be boolean")
        self.__dict__["training"] = mode
        for child in self._modules.values():
            if child is not None:
                child.train(mode)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        fields = self.__dict__
        if (
            "_parameters" not in fields
            or name in fields["_parameters"]
            or name in fields["_buffers"]
            or name in fields["_modules"]
        ):  # before __init__
            super().__setattr__(name, value)
        elif type(value) is nn.Parameter and name not in fields:
            fields["_parameters"][name] = value
        elif isinstance(value, (Tensor, nn.Module)):
            super().__setattr__(name, value)
        else:
            object.__setattr__(self, name, value)


class Uncalled(CheapModule):
    """One that nobody calls: nothing reads its hooks."""

    _fresh = [f for f in _FRESH if not f[0].endswith("_hooks")]


for _cls, _table in (
    (CheapModule, _LATER),
    (Uncalled, {k: _Later(k, c) for k, c, _ in _FRESH if k.endswith("_hooks") and c}),
):
    for _name, _later in _table.items():
        setattr(_cls, _name, _later)


@contextmanager
def made_on_the_cpu() -> Iterator[None]:
    """Tensors without a device of their own are made on the CPU, whatever the caller's default is.

    Under `torch.device("meta")` nothing could be drawn. Parameters state their device: that of the weight they act on.
    """
    if torch.get_default_device().type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """No garbage collection while some 100,000 long-lived objects are made: each would be walked many times over."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
