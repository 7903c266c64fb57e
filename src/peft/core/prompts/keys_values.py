"""Keys and values before a model's own.

They are put into the cache that the stack is given: positions, masks and decoding then follow from the cache's length,
as for any text that went before. Where rows have fronts of different lengths, positions are counted here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import Refusal
from ..anatomy.language import CACHE, attentions, counting, first_position, floating, layer_of, where
from .arguments import Arguments, flat_mask, refuse_gap, refuse_packed, seen, tokens_of
from .front import Front
from .state import PromptState

if TYPE_CHECKING:
    from transformers import Cache


class KeysValues(PromptState):
    """The prefixes of a call in its cache, its mask and its positions."""

    def lead(self, module: nn.Module, kwargs: Arguments, front: Front) -> None:
        """Prefixes into the cache and the mask; positions, where the model would count them wrongly."""
        tokens = tokens_of(kwargs)
        length, past = tokens.shape[1], seen(kwargs.get(CACHE))
        given: Tensor | None = self.call.given if front.S else kwargs.get("position_ids")
        made: Tensor | None = None
        if front.P:
            total = length if not past else past - front.P + length
            refuse_packed(given, kwargs.get("attention_mask"), past)
            mask = flat_mask(kwargs.get("attention_mask"), total)
            if not past:
                dtype = tokens.dtype if tokens.is_floating_point() else floating(module)
                self.call.lent = kwargs.get(CACHE) is None and kwargs.get("use_cache") is False
                kwargs[CACHE] = self.roomy(kwargs.get(CACHE), front)
                refuse_gap(module, kwargs[CACHE], front)
                self.fill(kwargs[CACHE], attentions(module), front, dtype)
            if mask is None and front.uneven:
                mask = torch.ones(front.rows, total, device=tokens.device).long()
            if mask is not None:
                kwargs["attention_mask"] = torch.cat(
                    [front.visible(front.keyed, front.P, mask.device).to(mask.dtype), mask], 1
                )
            made = given + front.P if given is not None and not front.uneven and not front.S else None
        elif front.S and not past and kwargs.get(CACHE) is not None:
            kwargs[CACHE] = self.roomy(kwargs[CACHE], front)
        if front.uneven:
            made = self.positions(module, kwargs, front, length, past, given)
        if made is not None:
            kwargs["position_ids"] = made

    def positions(
        self, module: nn.Module, kwargs: Arguments, front: Front, length: int, past: int, given: Tensor | None
    ) -> Tensor | None:
        """[rows, length]: positions as each row would have them alone. None where the model's own count is right."""
        how = counting(module)
        if how == "own":
            raise Refusal(
                "adapter_names",
                type(module).__name__,
                "its rows have different numbers of virtual tokens, and it counts positions itself (no position_ids)",
            )
        if how != "given":
            kwargs.pop("position_ids", None)
            return None
        device, index = kwargs["attention_mask"].device, torch.arange(length, device=kwargs["attention_mask"].device)
        if self.trailing:
            return index + front.per_row(front.keyed, device)[:, None] + first_position(module)
        own = front.per_row([s + p for s, p in zip(front.soft, front.keyed, strict=True)], device)
        counted = index[None] + (past or front.P) - (front.width - own)[:, None]
        counted = counted.clamp(min=0) + first_position(module)
        if given is not None and given.dim() == 2:
            own = given.to(device).expand(front.rows, -1) + front.per_row(front.keyed, device)[:, None]
            own = F.pad(own, (length - own.shape[1], 0))
            plain = front.per_row(front.soft, device)[:, None] == 0
            counted = torch.where(plain, own, counted)
        return counted

    def fill(self, cache: Cache, modules: Iterable[nn.Module], front: Front, dtype: torch.dtype) -> None:
        """Each layer's prefix into the cache; shared by the batch until the cache lays out its own memory."""
        own = getattr(cache, "self_attention_cache", cache)
        done: set[int] = set()
        for module in modules:
            layer = layer_of(module)
            if layer is None or layer in done:
                continue
            done.add(layer)
            device = where(module)
            parts: list[list[Tensor | None]] = []
            for methods in front.groups:
                pairs = [m("keys_values", layer) for m in methods if m.keyed]
                parts.append([torch.cat([p[i] for p in pairs], 1) if pairs else None for i in (0, 1)])
            like = next(t for part in parts for t in part if t is not None)
            states = []
            for i in (0, 1):
                each = [
                    like.new_zeros(like.shape[0], 0, like.shape[2]) if (t := part[i]) is None else t for part in parts
                ]
                each = [F.pad(t, (0, 0, front.P - t.shape[1], 0)).expand(front.rows, -1, -1, -1) for t in each]
                states.append(front.choose(each).to(device, dtype))
            own.update(states[0], states[1], layer)

    def empty_cache(self) -> Cache:
        from transformers import DynamicCache, EncoderDecoderCache

        cache = DynamicCache(config=self.config)
        return EncoderDecoderCache(cache, DynamicCache(config=self.config)) if self.is_encoder_decoder else cache

    def roomy(self, cache: Cache | None, front: Front) -> Cache:
        """The cache to fill: one of fixed size was made without knowing of virtual tokens, so it gets a larger one."""
        if cache is None:
            return self.empty_cache()
        if getattr(cache, "is_compileable", False) and not self.is_encoder_decoder:
            longest = max(getattr(x, "max_cache_len", 0) for x in cache.layers)
            fixed: Callable[..., Cache] = type(cache)
            return fixed(config=self.config, max_cache_len=longest + front.width)
        return cache
