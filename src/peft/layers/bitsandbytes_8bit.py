"""bitsandbytes' LLM.int8() layers (arXiv 2208.07339): W~ = codes · SCB / 127 per output row.

The forward also codes the activations, row by row, to 8 bits. A model holds such a layer only where somebody imported
the library; nothing here does before.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..contract.kind import Example, Examples
from ..contract.own_forward import runs_as
from .coded import Quantised

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear8bitLt


class EightBit(Quantised["Linear8bitLt"]):
    name = "bitsandbytes_8bit"
    summary = "bitsandbytes' Linear8bitLt"
    # The base's forward rounds each input row to 127 steps (relative error up to 1/254 an entry); the merged layer
    # computes in floating point. Over these sums of 16 to 64 terms the two differ by about 1% of the largest output.
    tolerance = 2e-2
    compiles = False  # the library's forward rewrites the layer's state

    def examples(self) -> Examples:
        if find_spec("bitsandbytes") is None:
            return {}

        def make() -> Example:
            import bitsandbytes.nn as bnb

            layer = bnb.Linear8bitLt(16, 24, has_fp16_weights=False)
            layer.load_state_dict(nn.Linear(16, 24).state_dict())
            return layer.to("cpu").requires_grad_(False), torch.randn(4, 16)

        return {"bias": make}

    def claims(self, module: nn.Module) -> bool:
        bnb = sys.modules.get("bitsandbytes.nn")
        return bnb is not None and isinstance(module, bnb.Linear8bitLt) and runs_as(module, bnb.Linear8bitLt)

    def decode(self, module: Linear8bitLt) -> Tensor:
        codes = module.state.CB if module.state.CB is not None else module.weight.data
        scale = module.state.SCB if module.state.SCB is not None else getattr(module.weight, "SCB", None)
        if codes.is_floating_point():  # not coded yet: the library does that when the layer is moved
            return codes
        if scale is None:
            raise ValueError("This 8-bit layer has codes but no scales (SCB): its checkpoint is incomplete.")
        return (codes.to(scale.dtype) * (scale / 127)[:, None]).to(self.model_dtype(module))

    def model_dtype(self, module: Linear8bitLt) -> torch.dtype:
        """The codes do not tell: the bias has the model's dtype, else what was found around the layer."""
        if module.bias is not None:
            return module.bias.dtype
        return module.__dict__.get("surrounding_dtype", torch.float32)

    def adopted(self, module: Linear8bitLt, dtype: torch.dtype) -> None:
        module.__dict__["surrounding_dtype"] = dtype

    def encode(self, original: Linear8bitLt, merged: nn.Linear) -> nn.Module:
        import bitsandbytes.nn as bnb

        coded = bnb.Linear8bitLt(
            merged.in_features,
            merged.out_features,
            bias=merged.bias is not None,
            has_fp16_weights=False,
            threshold=original.state.threshold,
            device="meta",
        )
        coded.bias = merged.bias
        coded.weight = bnb.Int8Params(merged.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        return coded.to(merged.weight.device)


kinds = [EightBit()]
