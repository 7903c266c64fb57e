"""Prefix tuning: every attention layer also attends to n trained keys and values (arXiv 2101.00190; 2110.07602).

All of them are one row per virtual token, [n, 2·L·kv] with kv = kv_heads · head_dim, holding K₀ V₀ K₁ V₁ …. With
`prefix_projection` (P-tuning v2) the row is W₂ tanh(W₁ e + b₁) + b₂ of a vector e[kv]. The decoder of an
encoder-decoder model reads pair 2i mod L at layer i: upstream's layout, in which half the pairs are not used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..config import PromptLearningConfig
from ..config_fields import among, own_field, ranged
from ..contract.site import Site
from ..core.anatomy.language import (
    attentions,
    key_value_shape,
    number,
    shares_keys,
    takes_prefix,
    token_and_cache_stacks,
)
from ..core.forms.prompt import Encoded, Table, columns, linear
from ..errors import Refusal

__all__ = ["PrefixTuningConfig"]


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning (arXiv 2101.00190).

    init_weights: "zero" starts with keys and values of 0, None at random. prefix_projection: train through a small
    network (P-tuning v2); encoder_hidden_size: its width. save_encoder: the file holds the network, too.
    """

    own_type = "PREFIX_TUNING"
    init_weights: Literal["zero"] | None = among(None, (None, "zero"))
    encoder_hidden_size: int | None = ranged(None)
    prefix_projection: bool = False
    save_encoder: bool = own_field(True)


class PrefixTuning(Encoded):
    peft_type = "PREFIX_TUNING"
    config_class = PrefixTuningConfig
    summary = "Puts trained keys and values before every attention layer's own."
    formula = "attention(q, [K; k], [V; v])"
    paper = "arXiv 2101.00190"
    networks = ("transform",)
    required, sized = ("num_layers", "token_dim", "num_attention_heads"), "this model's keys and values need {}"
    examples = (
        {"num_virtual_tokens": 3},
        {"num_virtual_tokens": 2, "prefix_projection": True, "encoder_hidden_size": 8},
    )

    @classmethod
    def sizes(cls, text: object, model: nn.Module) -> dict[str, int]:
        _, stack = token_and_cache_stacks(model)
        layers, told = (
            number(text, "num_hidden_layers"),
            [key_value_shape(m) for m in attentions(stack) if not shares_keys(m)],
        )
        known = [shape for shape in told if shape is not None]
        if known and None not in told:  # the widest layer's: narrower ones leave the rest of their columns unused
            heads, width = max(((h, max(k, v)) for h, k, v in known), key=math.prod)
            return {"num_layers": layers, "token_dim": heads * width, "num_attention_heads": heads}
        heads = number(text, "num_attention_heads", "encoder_attention_heads")
        width = getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or number(text, "hidden_size") // heads
        kv = getattr(text, "num_key_value_heads", None) or heads
        return {"num_layers": layers, "token_dim": width * kv, "num_attention_heads": kv}

    @classmethod
    def fits(cls, config: PromptLearningConfig, model: nn.Module) -> None:
        if reason := takes_prefix(model):
            raise Refusal(cls.peft_type, type(model).__name__, reason)
        super().fits(config, model)

    def __init__(self, config: PrefixTuningConfig, site: Site) -> None:
        super().__init__(config, site)
        assert config.num_layers is not None
        kv, out = config.token_dim, 2 * config.num_layers * config.token_dim
        self.transform: nn.Sequential | None = None
        self.embedding = Table(site.empty(config.num_virtual_tokens, kv if config.prefix_projection else out))
        if config.prefix_projection:
            hidden = config.encoder_hidden_size or kv
            self.transform = nn.Sequential(linear(site, kv, hidden), nn.Tanh(), linear(site, hidden, out))

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        super().reset(rng, site)
        if self.config.init_weights == "zero":
            for p in self.embedding.parameters() if self.transform is None else self.transform[2].parameters():
                p.zero_()

    def encode(self, table: Tensor, part: slice | None = None) -> Tensor:
        assert self.transform is not None
        return columns(self.transform, table, part)

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        c = self.config
        pair = layer if c.num_transformer_submodules == 1 else (2 * layer) % c.num_layers
        rows = self.result(slice(2 * pair * c.token_dim, 2 * (pair + 1) * c.token_dim))  # [n, 2 kv]
        K, V = rows.reshape(len(rows), 2, c.num_attention_heads, -1).permute(1, 2, 0, 3)  # [heads, n, width] each
        return K, V
