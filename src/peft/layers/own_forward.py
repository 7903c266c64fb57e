"""Subclasses of known layers that override `forward`: scaled, cosine and grouped products, routers, convolutions that pad.

Only their own forward says what a changed weight means, so it runs on W' = W + ΔW, which is composed in each call, and
a merge writes the same W'. Nothing stands beside the layer's product, so there is no input that dropout could act on.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..contract.kind import Examples, LayerKind
from ..contract.method import Method
from ..contract.own_forward import computed, holds
from ..errors import Refusal
from .conv import Conv, ConvTranspose
from .embedding import Embedding, tokens
from .gpt2_conv1d import GPT2Conv1D
from .linear import Linear

M = TypeVar("M", bound=nn.Module)


class Own(LayerKind[M]):
    """What these kinds share; the rest is the parent's: where the matrix is and how large."""

    factored = False
    own_forward = True
    by_type = False
    priority: ClassVar[int] = -1  # asked after the layer itself

    def admit(self, module: M, method: Method, path: str) -> None:
        super().admit(module, method, path)
        name = type(module).__name__
        if not method.mergeable:
            raise Refusal(
                method.peft_type,
                f"{path} ({name})",
                "this class has a forward of its own, which takes another weight and nothing beside it",
            )
        if method.shifts and module._parameters.get("bias") is None:
            raise Refusal(
                method.peft_type, f"{path} ({name})", "it adds a bias, and the forward of this layer has none"
            )
        if method.dropout:
            warnings.warn(
                f"{path}: {name} has a forward of its own, which runs on W + ΔW: the adapter's dropout does not act there.",
                stacklevel=2,
            )

    def as_linear(self, module: M) -> None:
        return None


class OwnLinear(Own[nn.Linear], Linear):
    name = "own_linear"
    summary = "subclasses of nn.Linear with a forward of their own, which runs on W + ΔW"

    def examples(self) -> Examples:
        return {"cosine": lambda: (CosineLinear(16, 24), torch.randn(4, 16))}

    def claims(self, module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear) or computed(module) or Linear.claims(self, module):
            return False
        return holds(module, (module.out_features, module.in_features))


class OwnConv(Own[_ConvNd], Conv):
    def __init__(self, axes: int) -> None:
        super().__init__(axes)
        self.name, self.summary = f"own_{self.name}", f"subclasses of nn.Conv{axes}d that pad or standardise, say"

    def examples(self) -> Examples:
        return {"causal": lambda: (CausalConv(8, 12, 3, dilation=2), torch.randn(4, 8, 6))} if self.axes == 1 else {}

    def claims(self, module: nn.Module) -> bool:
        if not isinstance(module, self.module_class) or computed(module) or Conv.claims(self, module):
            return False
        return _conv(module)


class OwnConvTranspose(Own[_ConvNd], ConvTranspose):
    def __init__(self, axes: int) -> None:
        super().__init__(axes)
        self.name, self.summary = (
            f"own_{self.name}",
            f"subclasses of nn.ConvTranspose{axes}d with a forward of their own",
        )

    def examples(self) -> Examples:
        return {}

    def claims(self, module: nn.Module) -> bool:
        if not isinstance(module, self.module_class) or computed(module) or ConvTranspose.claims(self, module):
            return False
        return _conv(module)


class OwnEmbedding(Own[nn.Embedding], Embedding):
    name = "own_embedding"
    summary = "subclasses of nn.Embedding with a forward of their own: positions, scaled or normalised rows"

    def examples(self) -> Examples:
        return {"normalised": lambda: (NormalisedEmbedding(24, 16), tokens())}

    def claims(self, module: nn.Module) -> bool:
        if not isinstance(module, nn.Embedding) or module.max_norm is not None or computed(module):
            return False
        return not Embedding.claims(self, module) and holds(module, (module.num_embeddings, module.embedding_dim))


class OwnGPT2Conv1D(Own[Any], GPT2Conv1D):
    name = "own_gpt2_conv1d"
    summary = "subclasses of transformers' Conv1D with a forward of their own"

    def examples(self) -> Examples:
        return {}

    def claims(self, module: nn.Module) -> bool:
        if not self.is_one(module) or computed(module) or GPT2Conv1D.claims(self, module):
            return False
        weight = module._parameters.get("weight")
        return weight is not None and holds(module, (weight.shape[0], module.nf))  # type: ignore[arg-type]


def _conv(module: _ConvNd) -> bool:
    first, second = (
        (module.in_channels, module.out_channels) if module.transposed else (module.out_channels, module.in_channels)
    )
    return holds(module, (first, second // module.groups, *module.kernel_size))


class CosineLinear(nn.Linear):
    """An example: the cosines of x and the rows of W, times a constant."""

    def forward(self, input: Tensor) -> Tensor:
        x, W = (nn.functional.normalize(t, dim=-1) for t in (input, self.weight))
        return 4.0 * nn.functional.linear(x, W, self.bias)


class CausalConv(nn.Conv1d):
    """An example: padded on the left only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


class NormalisedEmbedding(nn.Embedding):
    """An example: rows of length 1."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(input), dim=-1)


kinds: list[LayerKind] = [
    OwnLinear(),
    *(OwnConv(n) for n in (1, 2, 3)),
    *(OwnConvTranspose(n) for n in (1, 2, 3)),
    OwnEmbedding(),
    OwnGPT2Conv1D(),
]
