"""The sizes of a layer, whatever its kind: what methods may ask."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """The sizes of a layer seen as `y = W x`."""

    out: int  # output channels
    fan_in: int  # columns of W; 0 where there is no weight matrix
    inputs: int  # input channels: the size of x's channel axis; of an embedding, the size of its rows
    kernel: int = 1  # taps of a convolution kernel
    groups: int = 1
    indexed: bool = False  # x holds indices (an embedding): W's columns are looked up
    shape: tuple[int, ...] = ()  # the native kernel size, () for layers without one

    @property
    def weightless(self) -> bool:
        return self.fan_in == 0

    @property
    def factored(self) -> bool:
        """Whether `pointwise(op(x, A), B)` equals `op(x, B @ A)`: not when groups share no inputs."""
        return self.groups == 1

    @property
    def pointwise(self) -> bool:
        """Whether a matrix on x's channels is a matrix on W's columns."""
        return self.kernel == 1 and self.groups == 1 and not self.indexed

    @property
    def is_matrix(self) -> bool:
        """Whether the layer is one matrix on the last axis of its input: y = x Wᵀ, no kernel of whatever size."""
        return self.pointwise and not self.shape

    @property
    def width(self) -> int:
        """The size of the vectors an input transform (`before`) acts on: channels, or the columns of a kernel's W."""
        return self.inputs if self.pointwise or self.indexed else self.fan_in

    def spread(self, channels: Tensor) -> Tensor:
        """A vector `[inputs]` as a factor for the entries of `W[out, fan_in]`, for kernels and groups."""
        per = channels.reshape(self.groups, 1, self.inputs // self.groups, 1)
        full = per.expand(self.groups, self.out // self.groups, self.inputs // self.groups, self.kernel)
        return full.reshape(self.out, self.fan_in)


@functools.lru_cache(maxsize=4096)
def plain_geometry(out: int, inputs: int) -> Geometry:
    """That of a plain matrix: one object for all layers of a size."""
    return Geometry(out=out, fan_in=inputs, inputs=inputs)
