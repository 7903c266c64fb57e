"""nn.Linear whose weight is one of torchao's tensor subclasses: W~ = (codes − zero point) · scale per block.

The layer is an ordinary nn.Linear and the tensor answers `F.linear` and `dequantize()`; `weight.data` and the dtype it
shows are those of the decoded weight. The library is never imported here unless the model already holds its tensors.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.kind import Example, Examples
from ..contract.own_forward import runs_as
from ..errors import Refusal
from .coded import Quantised


class TorchAO(Quantised[nn.Linear]):
    name = "torchao"
    summary = "nn.Linear with a weight quantised by torchao"
    tolerance = 1e-4  # weight-only: the forward is the dequantised layer's, up to the order of fp32 sums

    def examples(self) -> Examples:
        if find_spec("torchao") is None:
            return {}

        def make(bits: int) -> Example:
            from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

            layer = nn.Sequential(nn.Linear(32, 24))
            four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))  # type: ignore[attr-defined]
            quantize_(layer, Int8WeightOnlyConfig() if bits == 8 else four)
            layer[0].__dict__.pop("extra_repr", None)  # a partial that torchao sets, which does not pickle
            return layer[0].requires_grad_(False), torch.randn(4, 32)

        return {"int8": lambda: make(8), "int4": lambda: make(4)}

    def claims(self, module: nn.Module) -> bool:
        base = getattr(sys.modules.get("torchao.utils"), "TorchAOBaseTensor", None)
        weight = module._parameters.get("weight")
        if base is None or not isinstance(module, nn.Linear) or weight is None or not isinstance(weight.data, base):
            return False
        return runs_as(module, nn.Linear)

    def decode(self, module: nn.Linear) -> Tensor:
        return module.weight.dequantize()

    def model_dtype(self, module: nn.Linear) -> torch.dtype:
        return module.weight.dtype

    def encode(self, original: nn.Linear, merged: nn.Linear) -> nn.Module:
        coded = nn.Linear(merged.in_features, merged.out_features, bias=False, device="meta")
        coded.bias = merged.bias
        coded.weight = nn.Parameter(_encode(original.weight.data, merged.weight.data), requires_grad=False)
        return coded


def _encode(like: Any, W: Tensor) -> Tensor:
    """W in the format of the quantised tensor `like`: same code type, same blocks, symmetric where that was."""
    try:
        from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerGroup, PerRow, PerTensor
        from torchao.quantization.quant_primitives import MappingType
    except ImportError as e:  # tensors of another kind, before these
        raise _not_recorded(like) from e

    zero = getattr(like, "zero_point", None)
    mapping = MappingType.SYMMETRIC if zero is None or not zero.any() else MappingType.ASYMMETRIC
    block = tuple(like.block_size) if hasattr(like, "block_size") else ()
    if isinstance(like, IntxUnpackedToInt8Tensor):
        return IntxUnpackedToInt8Tensor.from_hp(
            W, block, like.target_dtype, mapping_type=mapping, activation_quantization=like.activation_quantization
        )
    if isinstance(like, Int8Tensor):
        whole, row = block == tuple(W.shape), block == (1, W.shape[1])
        granularity = PerTensor() if whole else PerRow() if row else PerGroup(block[1])
        return Int8Tensor.from_hp(
            W,
            granularity,
            mapping_type=mapping,
            act_quant_kwargs=like.act_quant_kwargs,
            reduce_range=like.reduce_range,
        )
    raise _not_recorded(like)


def _not_recorded(like: Any) -> Refusal:
    return Refusal(
        "requantize",
        type(like).__name__,
        "this tensor does not record the settings it was quantised with; merge without requantize=True and quantise "
        "the result with torchao's quantize_",
    )


kinds = [TorchAO()]
