"""transformers' linear layers with float8 codes: W~ = code · scale, one scale for the weight, a row, or a block of it.

`FP8Linear` (fine-grained FP8, as DeepSeek-V3's files have it) and compressed-tensors' `CompressedTensorsFP8Linear`. Both
code their input, too, and run on kernels for GPUs; adapters stand beside them in floating point. Their subclasses with
a forward of their own (grouped products), and FP4 codes, two a byte, are not taken.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..contract.own_forward import runs_as
from ..errors import Refusal
from .coded import Quantised

if TYPE_CHECKING:

    class Layer(nn.Linear):
        """With its scales: one of the two, by class."""

        weight_scale_inv: Tensor
        weight_scale: Tensor
        block_size: tuple[int, int] | None


CLASSES = (
    ("transformers.integrations.finegrained_fp8", "FP8Linear"),
    ("transformers.integrations.compressed_tensors", "CompressedTensorsFP8Linear"),
)
CODES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)


class Float8(Quantised["Layer"]):
    name = "fp8_linear"
    summary = "transformers' linear layers with float8 codes and scales by block, row or weight"
    tolerance = 5e-2  # the layer's input has 3 bits of mantissa, the merged layer's all

    def claims(self, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        if weight is None or weight.dtype not in CODES or not isinstance(module, nn.Linear):
            return False
        for home, name in CLASSES:
            cls = getattr(sys.modules.get(home), name, None)
            if cls is not None and isinstance(module, cls):
                return runs_as(module, cls)
        return False

    def decode(self, module: Layer) -> Tensor:
        return (module.weight.float() * _spread(module)).to(self.model_dtype(module))

    def model_dtype(self, module: Layer) -> torch.dtype:
        """The codes do not tell: the bias has the model's dtype, else what was found around the layer."""
        if module.bias is not None:
            return module.bias.dtype
        return module.__dict__.get("surrounding_dtype", torch.get_default_dtype())

    def adopted(self, module: Layer, dtype: torch.dtype) -> None:
        module.__dict__["surrounding_dtype"] = dtype

    def encode(self, original: Layer, merged: nn.Linear) -> nn.Module:
        raise Refusal(
            "requantize",
            type(original).__name__,
            "its scales come with the checkpoint; merge without requantize=True and quantise the saved model",
        )


def _spread(module: Layer) -> Tensor:
    """A factor for the entries of the weight."""
    if hasattr(module, "weight_scale"):
        return module.weight_scale.float().reshape(-1, 1)  # one a row, or one for all
    scale = module.weight_scale_inv.float()
    if scale.dim() < 2 or scale.numel() == 1:
        return scale.reshape(1, 1)
    out, inputs = module.weight.shape
    rows, columns = module.block_size or (-(-out // scale.shape[0]), -(-inputs // scale.shape[1]))
    return scale.repeat_interleave(rows, 0)[:out].repeat_interleave(columns, 1)[:, :inputs]


kinds = [Float8()]
