"""Convolutions and transposed convolutions over 1, 2 or 3 axes: y = W ∗ x + b with W[out, inputs/groups · kernel].

Every matrix runs through the layer's own stride, padding (its mode too), dilation and groups. With one group the
factored form is a convolution with A as r output channels, then B over the channels: `B ∗₁ (A ∗ x) = (B A) ∗ x`.
With groups each output sees its own group's inputs only, so r shared channels do not exist and ΔW is run whole.
"""

from __future__ import annotations

from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from ..contract.geometry import Geometry
from ..contract.kind import Examples, LayerKind
from ..contract.own_forward import computed, runs_as

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
POINTWISE = (F.conv1d, F.conv2d, F.conv3d)
DECONV = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class Conv(LayerKind[_ConvNd]):
    forward_parts: ClassVar[tuple[str, ...]] = ("_conv_forward",)  # what the forward of the class is made of

    def __init__(self, axes: int) -> None:
        self.axes = axes
        self.module_class: type[_ConvNd] = CONVS[axes - 1]
        self.classes = (self.module_class,)
        self.name = f"conv{axes}d"
        self.summary = f"nn.Conv{axes}d: stride, dilation, groups and every padding mode"

    def examples(self) -> Examples:
        if self.axes == 1:
            one = torch.randn(4, 8, 12)
            return {
                "stride": lambda: (nn.Conv1d(8, 16, 3, stride=2, padding=1), one),
                "same": lambda: (nn.Conv1d(8, 12, 3, padding="same", dilation=2, bias=False), one),
            }
        if self.axes == 3:
            return {"kernel": lambda: (nn.Conv3d(4, 8, (2, 3, 1), padding=1), torch.randn(4, 4, 4, 4, 3))}
        return {
            "stride": lambda: (nn.Conv2d(8, 16, 3, stride=2, padding=1), torch.randn(4, 8, 7, 6)),
            "pointwise": lambda: (nn.Conv2d(8, 16, 1), torch.randn(4, 8, 3, 3)),
            "dilation": lambda: (nn.Conv2d(8, 16, 3, dilation=2), torch.randn(4, 8, 7, 6)),
            "groups": lambda: (nn.Conv2d(8, 16, 3, groups=2, padding="valid"), torch.randn(4, 8, 5, 5)),
            "circular": lambda: (nn.Conv2d(8, 16, 3, padding=2, padding_mode="circular"), torch.randn(4, 8, 5, 6)),
            "reflect": lambda: (nn.Conv2d(8, 16, (3, 1), padding="same", padding_mode="reflect"), torch.randn(4, 8, 5, 4)),
            "rectangle": lambda: (
                nn.Conv2d(8, 16, (1, 3), stride=(2, 1), padding=(0, 1), padding_mode="replicate"),
                torch.randn(4, 8, 6, 5),
            ),
        }  # fmt: skip

    def claims(self, module: nn.Module) -> bool:
        # a subclass with a forward of its own may use W in any way (standardise it, say)
        mine = isinstance(module, self.module_class) and not computed(module)
        return mine and runs_as(module, self.module_class, *self.forward_parts)

    def geometry(self, module: _ConvNd) -> Geometry:
        kernel = prod(module.kernel_size)
        return Geometry(
            out=module.out_channels,
            fan_in=module.in_channels // module.groups * kernel,
            inputs=module.in_channels,
            kernel=kernel,
            groups=module.groups,
            shape=tuple(module.kernel_size),
        )

    def op(self, module: _ConvNd, x: Tensor, matrix: Tensor) -> Tensor:
        weight = matrix.to(x.dtype).reshape(len(matrix), -1, *module.kernel_size)
        return module._conv_forward(x, weight, None)

    def pointwise(self, h: Tensor, matrix: Tensor) -> Tensor:
        return POINTWISE[self.axes - 1](h, matrix.reshape(*matrix.shape, *(1 for _ in range(self.axes))))

    # counted from the end, as inputs may lack the batch axis
    def channels_last(self, t: Tensor) -> Tensor:
        return t.movedim(-1 - self.axes, -1)

    def channels_back(self, t: Tensor) -> Tensor:
        return t.movedim(-1, -1 - self.axes)

    def matrix(self, native: Tensor, module: _ConvNd) -> Tensor:
        return native.flatten(1)

    def native(self, matrix: Tensor, module: _ConvNd) -> Tensor:
        return matrix.reshape(len(matrix), -1, *module.kernel_size)


class ConvTranspose(Conv):
    """W is kept as `[in, out/groups, *kernel]`: each input channel spreads its taps over the outputs."""

    forward_parts: ClassVar[tuple[str, ...]] = ("_output_padding",)

    def __init__(self, axes: int) -> None:
        super().__init__(axes)
        self.module_class = TRANSPOSED[axes - 1]
        self.classes = (self.module_class,)
        self.name = f"conv_transpose{axes}d"
        self.summary = f"nn.ConvTranspose{axes}d"

    def examples(self) -> Examples:
        if self.axes == 1:
            return {"stride": lambda: (nn.ConvTranspose1d(8, 16, 3, stride=2), torch.randn(4, 8, 5))}
        if self.axes == 3:
            return {"kernel": lambda: (nn.ConvTranspose3d(4, 8, (2, 3, 1), bias=False), torch.randn(4, 4, 3, 2, 3))}
        return {
            "output_padding": lambda: (
                nn.ConvTranspose2d(8, 16, 3, stride=2, padding=1, output_padding=1, dilation=2),
                torch.randn(4, 8, 4, 3),
            ),
            "groups": lambda: (nn.ConvTranspose2d(8, 16, (3, 2), groups=2), torch.randn(4, 8, 3, 3)),
        }

    def op(self, module: _ConvNd, x: Tensor, matrix: Tensor) -> Tensor:
        assert not isinstance(module.padding, str)
        return DECONV[self.axes - 1](
            x,
            self.native(matrix.to(x.dtype), module),
            None,
            module.stride,
            module.padding,
            module.output_padding,
            module.groups,
            module.dilation,
        )

    def matrix(self, native: Tensor, module: _ConvNd) -> Tensor:
        g = self.geometry(module).groups
        per_group = native.flatten(2).unflatten(0, (g, -1))  # [g, in/g, out/g, kernel]
        return per_group.transpose(1, 2).flatten(2).flatten(0, 1)

    def native(self, matrix: Tensor, module: _ConvNd) -> Tensor:
        """`matrix[k, in/groups · kernel]` for any k channels as `[in, k/groups, *kernel]`."""
        g = self.geometry(module)
        per_group = matrix.unflatten(1, (-1, g.kernel)).unflatten(0, (g.groups, -1))  # [g, k/g, in/g, kernel]
        return per_group.transpose(1, 2).flatten(0, 1).unflatten(2, g.shape)


kinds = [*(Conv(n) for n in (1, 2, 3)), *(ConvTranspose(n) for n in (1, 2, 3))]
