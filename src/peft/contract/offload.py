"""Weights that accelerate keeps elsewhere (`device_map` with "cpu" or "disk"): brought in, and written so that they stay.

A hook on each module loads its tensors before a forward and leaves empty ones behind. What is written meanwhile would
be lost, so written values go into what the hook loads from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

Source: TypeAlias = Mapping[str, Tensor]


class Hook(Protocol):
    """What of accelerate's hook is used here."""

    offload: bool
    weights_map: Source

    def pre_forward(self, module: nn.Module) -> object: ...

    def post_forward(self, module: nn.Module, output: None) -> object: ...


def on_device(module: nn.Module) -> AbstractContextManager[None]:
    """A context in which offloaded weights at and below `module` are present."""
    if not any("_hf_hook" in m.__dict__ for m in module.modules()):
        return nullcontext()
    return present(module)


class Written(Mapping[str, Tensor]):
    """A hook's source of tensors with some of them replaced; never changed, so that an earlier one brings all back."""

    source: Source
    written: dict[str, Tensor]

    def __init__(self, source: Source, written: dict[str, Tensor]) -> None:
        self.source = source.source if isinstance(source, Written) else source
        self.written = {**source.written, **written} if isinstance(source, Written) else written

    def __getitem__(self, name: str) -> Tensor:
        return self.written[name] if name in self.written else self.source[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self.source, *self.written)))

    def __len__(self) -> int:
        return len(list(iter(self)))


def hooks(module: nn.Module) -> list[Hook]:
    """The module's own hooks that load its tensors for a forward."""
    held = getattr(module, "_hf_hook", None)
    return [h for h in getattr(held, "hooks", (held,)) if h is not None and getattr(h, "offload", False)]


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Within, the tensors of the module and of what is below it are here, also while the module itself runs."""
    loading = [(m, h) for m in module.modules() for h in hooks(m)]
    for m, h in loading:
        h.pre_forward(m)
        h.offload = False  # a forward within uses what is here now
    try:
        yield
    finally:
        for m, h in loading:
            h.offload = True
            h.post_forward(m, None)


def store(owner: nn.Module, names: list[str]) -> None:
    """Let what `owner` holds now under these names be what its hooks load from now on. Called within `present`."""
    hook = getattr(owner, "_hf_hook", None)
    for h in getattr(hook, "hooks", (hook,)):
        source = getattr(h, "weights_map", None)
        if h is None or source is None:
            continue
        tables = (owner._parameters, owner._buffers if getattr(h, "offload_buffers", False) else {})
        held = {n: t for table in tables for n in names if (t := table.get(n)) is not None}
        values = {n: t.detach().to("cpu", copy=True) for n, t in held.items()}
        h.weights_map = Written(source, values)


def sources(owner: nn.Module) -> list[tuple[Hook, Source]]:
    """What `put_back` needs to undo `store`."""
    return [(h, h.weights_map) for h in hooks(owner)]


def put_back(found: list[tuple[Hook, Source]]) -> None:
    for hook, source in found:
        hook.weights_map = source


def home(module: nn.Module) -> torch.device | None:
    """Where hooks let the module compute, None without hooks that say so."""
    held = module.__dict__.get("_hf_hook")
    for h in reversed(getattr(held, "hooks", (held,))) if held is not None else ():
        where = getattr(h, "execution_device", None)
        if where is not None:
            return torch.device(f"cuda:{where}" if isinstance(where, int) else where)
    return None
