"""Any block: it is called as it is, and methods act on its output, or replace its parameters.

A block says neither how wide its input and output are nor where their channels lie. Both are told from the layers
inside it; where that is not possible the width is 0, and methods that need it refuse the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..contract import offload
from ..contract.geometry import Geometry
from ..contract.kind import Examples, LayerKind
from ..contract.tree import tree

WIDTHS = ("hidden_size", "d_model", "n_embd", "embed_dim")  # what blocks call the size of the residual stream
OUTPUTS = ("o_proj", "out_proj", "c_proj", "down_proj", "wo", "o", "w2", "fc2")  # last projections, by name
LAYERS = (nn.Linear, nn.Embedding, _ConvNd)
SPATIAL = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.BatchNorm2d, nn.BatchNorm3d)
CHANNELS_AMID = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.GroupNorm)  # [batch, channels] or more after them


class DecoderBlock(nn.Module):
    """A law's example: a residual block that takes a mask besides its input and returns a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix, self.mlp = nn.RMSNorm(width), nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(self.mix(self.norm(hidden_states)) @ hidden_states.mT + mask, -1)
        return hidden_states + self.mlp(weights @ hidden_states), weights


class Opaque(LayerKind[nn.Module]):
    name = "opaque"
    summary = "any module without a single weight matrix: decoder blocks, MLPs, attention, norms, heads"
    priority = -100  # what no other kind claims
    fresh_output = False

    def examples(self) -> Examples:
        return {
            "mlp": lambda: (nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), torch.randn(4, 3, 16)),
            "norm": lambda: (nn.LayerNorm(16), torch.randn(4, 3, 16)),
            "rms_norm": lambda: (nn.RMSNorm(16), torch.randn(4, 3, 16)),
            "block": lambda: (DecoderBlock(16), (torch.randn(4, 3, 16), torch.randn(4, 3, 3))),
        }

    def claims(self, module: nn.Module) -> bool:
        return True

    def geometry(self, module: nn.Module) -> Geometry:
        out = output_width(module)
        inputs, kernel, indexed = first_layer(module)
        return Geometry(out=out, fan_in=0, inputs=inputs or out, kernel=kernel, indexed=indexed)

    def why_opaque(self, module: nn.Module) -> str:
        if not isinstance(module, LAYERS):
            return ""
        weight = module._parameters.get("weight")
        kept = (
            "no weight"
            if weight is None
            else f"a weight of {str(weight.dtype).removeprefix('torch.')} and shape {tuple(weight.shape)}"
        )
        return f"{type(module).__name__} has a forward of its own and keeps {kept}, which a change cannot be added to"

    def device(self, module: nn.Module) -> torch.device:
        """Where the block computes, also when its weights are offloaded and accelerate's hooks are on its children."""
        for m in tree(module):
            found = offload.home(m)
            if found is not None:
                return found
        return super().device(module)


class Maps(Opaque):
    name = "maps"
    summary = "any module that ends in a 2-d or 3-d convolution or batch norm: its output has the channels second"
    priority = -99

    def examples(self) -> Examples:
        stage = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        return {
            "stage": lambda: (nn.Sequential(*stage), torch.randn(4, 3, 5, 5)),
            "norm": lambda: (nn.BatchNorm2d(16), torch.randn(4, 16, 5, 5)),
        }

    def claims(self, module: nn.Module) -> bool:
        return isinstance(last_sized(module), SPATIAL)

    def channels_last(self, t: Tensor) -> Tensor:
        return t.movedim(1, -1) if t.dim() > 3 else t  # three axes: patches, already flattened

    def channels_back(self, t: Tensor) -> Tensor:
        return t.movedim(-1, 1) if t.dim() > 3 else t


def size_out(module: nn.Module) -> int:
    """The channels that a single layer gives; 0 for modules that are none."""
    for name in ("out_features", "nf", "out_channels", "num_features", "num_channels"):
        size = getattr(module, name, None)
        if isinstance(size, int):
            return size
    return 0


def sized(module: nn.Module) -> Iterator[nn.Module]:
    return (m for m in tree(module) if size_out(m))


def last_sized(module: nn.Module) -> nn.Module | None:
    last = None
    for last in sized(module):  # noqa: B007
        pass
    return last


def stated(owner: object, names: tuple[str, ...] = WIDTHS) -> int:
    return next((size for n in names if isinstance(size := getattr(owner, n, None), int)), 0)


def output_width(module: nn.Module) -> int:
    """The channels of a block's output: stated by it, else those of its last layer, else those of its parameters."""
    if isinstance(module, nn.RNNBase):
        return (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
    if size := stated(module):
        return size
    last = last_sized(module)
    if last is not None:
        named = next((s for n in OUTPUTS if (s := size_out(module._modules.get(n) or nn.Identity()))), 0)
        return 0 if isinstance(last, CHANNELS_AMID) else named or size_out(last)
    parameters = list(module.parameters())
    if not parameters:
        return 0
    weight = module._parameters.get("weight")
    if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
        return int(weight.shape[0])  # a router: a linear layer by another name
    for owner in tree(module):  # experts: stacks of matrices that no layer holds
        if size := stated(owner, (*WIDTHS, "hidden_dim")):
            return size
    return stated(getattr(module, "config", None)) or int(parameters[-1].shape[-1] if parameters[-1].dim() else 0)


def first_layer(module: nn.Module) -> tuple[int, int, bool]:
    """(channels of a block's input, taps of the kernel that reads it, whether it holds indices); 0 if unknown."""
    for m in tree(module):
        if isinstance(m, nn.Embedding):
            return 0, 1, True
        weight = m._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and not size_out(m):
            return int(weight.shape[1]), 1, False  # a router
        for name in ("in_features", "nx", "in_channels", "input_size"):
            size = getattr(m, name, None)
            if isinstance(size, int):
                return size, prod(getattr(m, "kernel_size", (1,))), False
    return 0, 1, False


kinds = [Opaque(), Maps()]
