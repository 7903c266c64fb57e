"""The stand-in for nn.MultiheadAttention: attention between an input projection and an output projection.

    q, k, v = rows of W_in x + b_in      y = W_out softmax(q kᵀ/√d + mask) v + b_out

The module reads its weights raw, so wrapping its children does nothing. The composite in its place calls the original
while no adapter acts. Otherwise it computes attention between its two parts, which are layers like any other: a slice
that stands for `in_proj_weight` (three slices where key and value have sizes of their own), and `out_proj`. Inputs
are turned batch first on the way, so that the first axis of what the parts see is the rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..contract.tree import Composite, Part
from ..core.acting.adapted_layer import AdaptedLayer
from ..core.acting.raw_reads import asks_for_parameter, reader
from .slice import acting_names, native
from .weight_slice import WeightSlice


class Attention(Composite):
    """nn.MultiheadAttention with adapters on its projections."""

    def __init__(self, base_layer: nn.MultiheadAttention) -> None:
        super().__init__()
        self.base_layer: nn.MultiheadAttention = base_layer
        size = base_layer.embed_dim
        if base_layer._qkv_same_embed_dim:
            self.in_proj = WeightSlice(base_layer, "in_proj_weight", "in_proj_bias")
        else:
            for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
                rows = slice(i * size, (i + 1) * size)
                part = WeightSlice(
                    base_layer, f"{name}_weight", "in_proj_bias", bias_rows=rows, bias_size=3 * size
                )  # fmt: skip
                setattr(self, name, part)
        self.training = base_layer.training

    @property
    def in_features(self) -> int:
        """What upstream's wrapper of the whole module says: the size of x, and of q, k and v together."""
        return self.base_layer.embed_dim

    @property
    def out_features(self) -> int:
        return 3 * self.base_layer.embed_dim

    @property
    def fused(self) -> bool:
        return self.base_layer._qkv_same_embed_dim

    def __getattr__(self, name: str) -> Any:
        """What reads a projection's weight instead of calling the module gets what the module computes with."""
        part = self.__dict__["_modules"].get(name.removesuffix("_weight")) if name.endswith("_weight") else None
        if part is not None and not asks_for_parameter() and (names := acting_names([part], reader())):
            return native(part, names)
        return super().__getattr__(name)

    def parts(self) -> dict[str, Part]:
        found = {n: Part(self, n, "" if self.fused else n) for n in self._modules if n != "base_layer"}
        return {**found, "out_proj": Part(self.base_layer, "out_proj", "base_layer.out_proj")}

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if acts_below(self):
            return self._attend(query, *args, **kwargs)
        return self.base_layer(query, *args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        base = self.base_layer
        if query.is_nested:
            raise ValueError("Adapters on nn.MultiheadAttention take padded tensors with a mask, not nested ones.")
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: pass the mask, too.")
        batched = query.dim() == 3
        first = not batched or base.batch_first
        if not batched:
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]

        def turn(t: Tensor) -> Tensor:  # [rows, positions, channels]
            return t[None] if not batched else t if first else t.transpose(0, 1)

        q, k, v = self._project(query, key, value, turn)
        n, length, size = q.shape
        heads, width = base.num_heads, base.head_dim

        # the hint makes the mask superfluous where nothing else needs it
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal or attn_mask is None else _additive(attn_mask, q.dtype)
        if mask is not None:
            mask = (
                mask.unflatten(0, (n, heads)) if mask.dim() == 3 else mask
            )  # [n, heads, length, keys] or [length, keys]
        extra = 0  # learned or zero keys that every query may look at
        if base.bias_k is not None and base.bias_v is not None:
            k = torch.cat([k, base.bias_k.expand(n, 1, size)], 1)
            v = torch.cat([v, base.bias_v.expand(n, 1, size)], 1)
            extra += 1
        if base.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            extra += 1
        if mask is not None:
            mask = F.pad(mask, (0, extra))
        if key_padding_mask is not None:
            padding = F.pad(_additive(key_padding_mask, q.dtype), (0, extra))[:, None, None]  # [n, 1, 1, keys]
            mask = padding if mask is None else mask + padding

        q, k, v = (t.unflatten(2, (heads, width)).transpose(1, 2) for t in (q, k, v))  # [n, heads, positions, width]
        dropout = base.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(2, 3) * width**-0.5
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        y = base.out_proj(y.transpose(1, 2).reshape(n, length, size))
        return (y[0] if not batched else y if first else y.transpose(0, 1)), weights

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, turn: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, ...]:
        """q, k, v. The fused projection runs once for each different input, which then takes its rows."""
        if not self.fused:
            return self.q_proj(turn(query)), self.k_proj(turn(key)), self.v_proj(turn(value))
        done: list[tuple[Tensor, tuple[Tensor, ...]]] = []
        for t in (query, key, value):
            if not any(t is seen for seen, _ in done):
                done.append((t, self.in_proj(turn(t)).chunk(3, -1)))
        return tuple(next(rows for seen, rows in done if seen is t)[i] for i, t in enumerate((query, key, value)))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to the scores; of a boolean one, True hides."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
    return mask.to(dtype)


def acts_below(module: nn.Module) -> bool:
    return any(m.acting for m in module.modules() if isinstance(m, AdaptedLayer))
