"""Any block: it is called as it is, and methods act on its output (or replace its parameters)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..core.layer import Geometry, LayerKind


class Opaque(LayerKind):
    name = "opaque"
    summary = "any module without a single weight matrix: decoder blocks, MLPs, attention, norms, heads"
    priority = -100  # what no other kind claims
    fresh_output = False

    def examples(self) -> dict[str, Callable[[], tuple[Any, ...]]]:
        return {
            "mlp": lambda: (nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), torch.randn(4, 3, 16)),
            "norm": lambda: (nn.LayerNorm(16), torch.randn(4, 3, 16)),
        }

    def claims(self, module: nn.Module) -> bool:
        return True

    def geometry(self, module: nn.Module) -> Geometry:
        width = output_width(module)
        return Geometry(out=width, fan_in=0, inputs=width)


def output_width(module: nn.Module) -> int:
    """The channels of a block's output: stated by it or its config, else those of its last layer; 0 if unknown."""
    for owner in (module, getattr(module, "config", None)):
        for name in ("hidden_size", "d_model", "n_embd", "embed_dim"):
            size = getattr(owner, name, None)
            if isinstance(size, int):
                return size
    width = 0
    for m in module.modules():
        for name in ("out_features", "nf", "out_channels", "embedding_dim"):
            size = getattr(m, name, None)
            if isinstance(size, int):
                width = size
    if not width:
        vectors = [p.shape[-1] for p in module.parameters() if torch.is_tensor(p) and p.dim()]
        width = vectors[-1] if vectors else 0
    return width


kinds = [Opaque()]
