"""GPT-2's Conv1D (transformers): a linear layer whose weight is kept as `[in, out]`, y = x P + b with P = Wᵀ."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..contract.geometry import Geometry, plain_geometry
from ..contract.kind import LayerKind


class GPT2Conv1D(LayerKind):
    name = "gpt2_conv1d"
    by_type = True
    linear = True
    summary = "transformers' Conv1D, the linear layer of GPT-2 with its weight transposed"

    def examples(self) -> dict[str, Callable[[], tuple[Any, ...]]]:
        from transformers.pytorch_utils import Conv1D

        return {"sequence": lambda: (Conv1D(24, 16), torch.randn(4, 3, 16))}

    def claims(self, module: nn.Module) -> bool:
        # a module of this class exists only where its file was imported; `import peft` need not import it
        home = sys.modules.get("transformers.pytorch_utils")
        return home is not None and isinstance(module, home.Conv1D)

    def geometry(self, module: nn.Module) -> Geometry:
        inputs, out = module.weight.shape  # type: ignore[union-attr,misc]
        return plain_geometry(int(out), int(inputs))

    def op(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(x, matrix.to(x.dtype))

    def matrix(self, native: Tensor, module: nn.Module) -> Tensor:
        return native.T

    def native(self, matrix: Tensor, module: nn.Module) -> Tensor:
        return matrix.T


kinds = [GPT2Conv1D()]
