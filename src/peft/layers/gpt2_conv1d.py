"""GPT-2's Conv1D (transformers): a linear layer whose weight is kept as `[in, out]`, y = x P + b with P = Wᵀ."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..contract.geometry import Geometry, plain_geometry
from ..contract.kind import Examples, LayerKind
from ..contract.own_forward import runs_as

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D


class GPT2Conv1D(LayerKind["Conv1D"]):
    name = "gpt2_conv1d"
    linear = True
    summary = "transformers' Conv1D, the linear layer of GPT-2 with its weight transposed"

    def examples(self) -> Examples:
        from transformers.pytorch_utils import Conv1D

        return {"sequence": lambda: (Conv1D(24, 16), torch.randn(4, 3, 16))}

    @staticmethod
    def is_one(module: nn.Module) -> bool:
        # a module of this class exists only where its file was imported; `import peft` need not import it
        home = sys.modules.get("transformers.pytorch_utils")
        return home is not None and isinstance(module, home.Conv1D)

    def claims(self, module: nn.Module) -> bool:
        return self.is_one(module) and runs_as(module, sys.modules["transformers.pytorch_utils"].Conv1D)

    def geometry(self, module: Conv1D) -> Geometry:
        inputs, out = module.weight.shape
        return plain_geometry(int(out), int(inputs))

    def op(self, module: Conv1D, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(x, matrix.to(x.dtype))

    def matrix(self, native: Tensor, module: Conv1D) -> Tensor:
        return native.T

    def native(self, matrix: Tensor, module: Conv1D) -> Tensor:
        return matrix.T


kinds = [GPT2Conv1D()]
