"""nn.Embedding: y = s · W[:, v] for each index v, W[dim, vocabulary] (kept transposed), s = 1 or the layer's scale.

An input transform acts on the looked-up rows. What a method adds to the output (a bias) moves into every column of W
when merged. Adapter gradients are dense whatever the layer's `sparse` says: it speaks of the frozen weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..contract.geometry import Geometry
from ..contract.kind import Examples, LayerKind
from ..contract.own_forward import runs_as, written_as


class ScaledEmbedding(nn.Embedding):
    """Word embeddings times a constant, as BART has them."""

    def __init__(self, num: int, dim: int, padding_idx: int | None, embed_scale: float | Tensor) -> None:
        super().__init__(num, dim, padding_idx)
        self.embed_scale = embed_scale

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class CastScaledEmbedding(nn.Embedding):
    """The same with the constant as a tensor, as Gemma has them."""

    embed_scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)


class Embedding(LayerKind[nn.Embedding]):
    name = "embedding"
    classes = (nn.Embedding,)
    summary = "nn.Embedding with padding_idx, and scaled word embeddings (Gemma, BART and their like)"

    def examples(self) -> Examples:
        return {
            "tokens": lambda: (nn.Embedding(24, 16), tokens()),
            "padding": lambda: (nn.Embedding(24, 16, padding_idx=0, sparse=True), tokens()),
            "scaled": lambda: (ScaledEmbedding(24, 16, 3, embed_scale=4.0), tokens()),
        }

    def claims(self, module: nn.Module) -> bool:
        if not isinstance(module, nn.Embedding) or module.max_norm is not None:
            return False
        # subclasses that compute positions or normalise rows are no lookup of W by the input
        return runs_as(module, nn.Embedding) or _scales(module)

    def geometry(self, module: nn.Embedding) -> Geometry:
        return Geometry(
            out=module.embedding_dim, fan_in=module.num_embeddings, inputs=module.embedding_dim, indexed=True
        )

    def op(self, module: nn.Embedding, x: Tensor, matrix: Tensor) -> Tensor:
        padding = (
            module.padding_idx if matrix.shape[1] == module.num_embeddings else None
        )  # else: another table's columns
        rows = F.embedding(x, matrix.T, padding, scale_grad_by_freq=module.scale_grad_by_freq)
        scale = _scale(module)
        if scale is None:
            return rows
        return rows * (scale.to(rows.dtype) if torch.is_tensor(scale) else scale)

    def swappable(self, module: nn.Embedding) -> bool:
        return not module.sparse

    def matrix(self, native: Tensor, module: nn.Embedding) -> Tensor:
        return native.T

    def native(self, matrix: Tensor, module: nn.Embedding) -> Tensor:
        return matrix.T

    def absorb(self, module: nn.Embedding, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if b is None:
            return W, None
        scale = _scale(module)
        return W + (b if scale is None else b / scale)[:, None], None


class ClippedEmbedding(Embedding):
    """max_norm: rows longer than that are scaled down when looked up, y = clip(W[:, v]).

    Clipping is not linear in W, so a term cannot be added to the layer's output: W' is composed and its rows clipped,
    which is what a merged layer does. The layer itself clips the rows of its weight in place, so that asking it twice
    gives other bits; a frozen weight stays as it is, and the rows are clipped on their way out.
    """

    name = "embedding_max_norm"
    summary = "nn.Embedding with max_norm"
    factored = False

    def examples(self) -> Examples:
        return {"max_norm": lambda: (nn.Embedding(24, 16, max_norm=3.0), tokens())}

    def claims(self, module: nn.Module) -> bool:
        plain = isinstance(module, nn.Embedding) and runs_as(module, nn.Embedding)
        return plain and module.max_norm is not None

    def run(self, module: nn.Embedding, *args: Any, **kwargs: Any) -> Any:
        assert module.max_norm is not None
        if module.weight.requires_grad:
            return module(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        rows = module.weight[x.flatten()]  # a copy
        torch.embedding_renorm_(rows, torch.arange(len(rows), device=rows.device), module.max_norm, module.norm_type)
        return rows.reshape(*x.shape, rows.shape[-1])

    def op(self, module: nn.Embedding, x: Tensor, matrix: Tensor) -> Tensor:
        assert module.max_norm is not None
        rows = super().op(module, x, matrix)
        norm = rows.norm(p=module.norm_type, dim=-1, keepdim=True).detach()  # a rewritten weight has no history
        return torch.where(norm > module.max_norm, rows * (module.max_norm / (norm + 1e-7)), rows)


def _scales(module: nn.Embedding) -> bool:
    """Whether its forward gives rows times `embed_scale`, and does nothing else."""
    if not hasattr(module, "embed_scale"):
        return False
    return written_as(module, nn.Embedding, ScaledEmbedding, CastScaledEmbedding) is not None


def _scale(module: nn.Embedding) -> Tensor | float | None:
    """The constant that a layer of this kind multiplies rows by; None for a plain lookup."""
    return None if type(module).forward is nn.Embedding.forward else getattr(module, "embed_scale", None)


def tokens() -> Tensor:
    return torch.randint(24, (4, 5))


kinds = [Embedding(), ClippedEmbedding()]
