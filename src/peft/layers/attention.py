"""nn.MultiheadAttention, whose part in a model is taken by a composite of its projections.

In eval, nn.TransformerEncoderLayer hands the raw weights of its children to one fused kernel, and nn.TransformerEncoder
packs sequences for it. While an adapter acts below them, both take their ordinary path.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..contract.kind import Examples, LayerKind
from ..contract.own_forward import runs_as
from ..contract.tree import Composite
from .attention_between_parts import Attention, acts_below
from .opaque import Opaque


class Unless:
    """A flag of a module, off while an adapter acts below it."""

    def __init__(self, flag: object, module: nn.Module) -> None:
        self.flag, self.module = flag, module

    def __bool__(self) -> bool:
        return bool(self.flag) and not acts_below(self.module)

    def __eq__(self, other: object) -> bool:
        return bool(self.flag == other)


# the flags that torch asks before it reads the weights of a block's children raw
FAST_PATHS = ((nn.TransformerEncoderLayer, "activation_relu_or_gelu"), (nn.TransformerEncoder, "use_nested_tensor"))


class MultiheadAttention(Opaque):
    """The kind of the whole module; its parts are slices and linear layers. Keeps torch's fast paths honest."""

    name = "multihead_attention"
    classes = (nn.MultiheadAttention,)
    summary = "nn.MultiheadAttention: its input and output projections"
    priority = 10
    linear = False

    def examples(self) -> Examples:
        whole = {"target_modules": ["site"]}

        def sides(*sizes: int) -> tuple[Tensor, ...]:
            return tuple(torch.randn(4, 3 if i == 0 else 5, n) for i, n in enumerate(sizes))

        return {
            "batch_first": lambda: (nn.MultiheadAttention(16, 4, batch_first=True), sides(16, 16, 16), whole),
            "sequence_first": lambda: (
                SequenceFirst(nn.MultiheadAttention(16, 2, bias=False, add_bias_kv=True, add_zero_attn=True)),
                torch.randn(4, 3, 16),
                {"target_modules": ["attn"]},
            ),
            "own_sizes": lambda: (
                nn.MultiheadAttention(16, 4, kdim=24, vdim=32, batch_first=True),
                sides(16, 24, 32),
                whole,
            ),
            "encoder_layer": lambda: (
                nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True),
                torch.randn(4, 3, 16),
                {"target_modules": ["self_attn", "linear1"]},
            ),
        }

    def claims(self, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention) and runs_as(module, nn.MultiheadAttention)

    def stand_in(self, module: nn.Module) -> Composite:
        assert isinstance(module, nn.MultiheadAttention)
        return Attention(module)

    def installed(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            for cls, flag in FAST_PATHS:
                held = module.__dict__.get(flag)
                if isinstance(module, cls) and held is not None and not isinstance(held, Unless):
                    module.__dict__[flag] = Unless(held, module)

    def removed(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            for _, flag in FAST_PATHS:
                held = module.__dict__.get(flag)
                if isinstance(held, Unless):
                    module.__dict__[flag] = held.flag


class SequenceFirst(nn.Module):
    """Self-attention on `[rows, positions, channels]` by a module that wants positions first: an example for the laws."""

    def __init__(self, attn: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        t = x.transpose(0, 1)
        return self.attn(t, t, t, need_weights=False)[0].transpose(0, 1)


kinds: list[LayerKind] = [MultiheadAttention()]
