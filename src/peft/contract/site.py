"""What a method may know of the place that it is made for, and how it runs the layer's own geometry."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from .geometry import Geometry


@dataclass(slots=True)
class Site:
    """What a method may know of the place it is created for. `path` is the module's name in the base model."""

    path: str
    geometry: Geometry
    read: Callable[[], Tensor]  # W[out, fan_in] in floating point
    parameters: Callable[[], dict[str, Tensor]]  # the module's parameters, native layout
    buffers: Callable[[], dict[str, Tensor]]  # and the buffers that belong to its state
    device: torch.device
    dtype: torch.dtype
    layer: str = "layer"  # for messages
    opaque: str = ""  # why the module has no matrix, where it looks as if it had
    shared: dict[str, nn.Parameter] = field(default_factory=dict)  # from Method.shared_tensors
    tied: str = ""  # the path of an earlier site of this method that holds the very same weight
    config: object = None  # the base model's config, where it has one
    embed: Callable[[Tensor], Tensor] | None = None  # for the whole model: its embeddings of token ids
    vocabulary: int = 0  # and how many ids there are

    def empty(self, *shape: int) -> nn.Parameter:
        """An uninitialised trainable parameter of this site."""
        if self.device.type == "meta":
            return nn.Parameter(_without_values(shape, self.dtype).data)
        return nn.Parameter(torch.empty(shape, device=self.device, dtype=self.dtype))


@functools.lru_cache(maxsize=1024)
def _without_values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One for all parameters of a shape: each gets memory of its own together with its values."""
    return torch.empty(shape, device="meta", dtype=dtype)


class Runs(Protocol):
    """What of a layer kind an `Op` uses."""

    def op(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor: ...

    def pointwise(self, h: Tensor, matrix: Tensor) -> Tensor: ...

    def channels_last(self, t: Tensor) -> Tensor: ...

    def channels_back(self, t: Tensor) -> Tensor: ...

    def read(self, module: nn.Module) -> Tensor: ...

    def bias(self, module: nn.Module) -> Tensor | None: ...


class Op:
    """A layer's geometry as a method's `add` sees it: run another matrix, apply a channel matrix, read W."""

    __slots__ = ("base", "geometry", "kind")

    def __init__(self, kind: Runs, base: nn.Module, geometry: Geometry) -> None:
        self.kind, self.base, self.geometry = kind, base, geometry

    def __call__(self, x: Tensor, matrix: Tensor) -> Tensor:
        return self.kind.op(self.base, x, matrix)

    def pointwise(self, h: Tensor, matrix: Tensor) -> Tensor:
        return self.kind.pointwise(h, matrix)

    def scale(self, y: Tensor, vector: Tensor) -> Tensor:
        """`vector[out]` times the channels of y."""
        return self.kind.channels_back(self.kind.channels_last(y) * vector)

    def shift(self, y: Tensor, vector: Tensor) -> Tensor:
        """`vector[out]` added to the channels of y."""
        return self.kind.channels_back(self.kind.channels_last(y) + vector)

    def read(self) -> Tensor:
        return self.kind.read(self.base)

    def bias(self) -> Tensor | None:
        return self.kind.bias(self.base)
