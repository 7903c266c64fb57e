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
from ..anatomy.language import (
    CACHE,
    attentions,
    counting,
    first_position,
    floating,
    key_value_shape,
    layer_of,
    shares_keys,
    where,
)
from .arguments import Arguments, flat_mask, recount, refuse_gap, refuse_packed, seen, taken, tokens_of, warn_of_window
from .front import Front
from .state import PromptState

if TYPE_CHECKING:
    from transformers import Cache


def fitted(pair: tuple[Tensor, Tensor], shape: tuple[int, int, int] | None) -> tuple[Tensor, Tensor]:
    """Keys and values [heads, n, width] as a layer of this shape takes them: the first of their columns."""
    if shape is None:
        return pair
    heads, *widths = shape

    def fit(t: Tensor, width: int) -> Tensor:
        if (t.shape[0], t.shape[2]) == (heads, width):
            return t
        row = t.transpose(0, 1).reshape(t.shape[1], -1)[:, : heads * width]
        return row.reshape(-1, heads, width).transpose(0, 1)

    keys, values = (fit(t, width) for t, width in zip(pair, widths, strict=True))
    return keys, values


class KeysValues(PromptState):
    """The prefixes of a call in its cache, its mask and its positions."""

    def lead(self, module: nn.Module, kwargs: Arguments, front: Front) -> None:
        """Prefixes into the cache and the mask; positions, where the model would count them wrongly."""
        tokens = tokens_of(kwargs)
        recount(kwargs)
        length, past = tokens.shape[1], seen(kwargs.get(CACHE))
        counted: Tensor | None = kwargs.get("position_ids")  # by who called the stack, front.S included
        given = self.call.given if front.S else counted
        if front.P:
            total = length if not past else past - front.P + length
            refuse_packed(given, kwargs.get("attention_mask"), past)
            mask = flat_mask(kwargs.get("attention_mask"), total)
            if not past:
                dtype = tokens.dtype if tokens.is_floating_point() else floating(module)
                self.call.lent = kwargs.get(CACHE) is None and kwargs.get("use_cache") is False
                kwargs[CACHE] = self.roomy(kwargs.get(CACHE), front)
                refuse_gap(module, kwargs[CACHE], front)
                warn_of_window(kwargs[CACHE], mask, front.P)
                self.fill(kwargs[CACHE], attentions(module), front, dtype)
            if mask is None and front.uneven:
                mask = torch.ones(front.rows, total, device=tokens.device).long()
            if mask is not None:
                kwargs["attention_mask"] = torch.cat(
                    [front.visible(front.keyed, front.P, mask.device).to(mask.dtype), mask], 1
                )
        elif front.S and not past and kwargs.get(CACHE) is not None:
            kwargs[CACHE] = self.roomy(kwargs[CACHE], front)
        if not front.uneven and (not front.width or (front.S and counted is not None)):
            made = counted + front.P if counted is not None and front.P else None
        else:
            made = self.positions(module, kwargs, front, length, past, given)
        if made is not None:
            kwargs["position_ids"] = made

    def positions(
        self, module: nn.Module, kwargs: Arguments, front: Front, length: int, past: int, given: Tensor | None
    ) -> Tensor | None:
        """[rows, length]: positions as each row would have them alone. None where the model's own count is right."""
        how = counting(module)
        if front.uneven and how == "own":
            raise Refusal(
                "adapter_names",
                type(module).__name__,
                "its rows have different numbers of virtual tokens, and it counts positions itself (no position_ids)",
            )
        if front.uneven and how != "given":
            kwargs.pop("position_ids", None)
            return None
        if how != "given" or (given is not None and given.dim() != 2):
            return given + front.P if given is not None and not front.uneven and not front.S else None
        tokens, mask = tokens_of(kwargs), kwargs.get("attention_mask")
        device, first = tokens.device, first_position(module)
        if self.trailing:
            if not front.uneven:
                return given + front.P if given is not None and not front.S else None
            return torch.arange(length, device=device) + front.per_row(front.keyed, device)[:, None] + first
        if given is not None:
            keyed = front.per_row(front.keyed, device)[:, None]
            text = given.to(device).expand(front.rows, -1) + front.per_row(front.soft, device)[:, None] + keyed
            if past or not front.S:
                return text
            index = (
                torch.arange(front.S, device=device) - front.per_row([front.S - s for s in front.soft], device)[:, None]
            )
            made = torch.cat([index.clamp(min=0) + keyed, text], 1)
            return made if self.call.order is None else taken(made, self.call.order)
        if not torch.is_tensor(mask) or mask.dim() != 2:
            return None
        made = (mask.long().cumsum(1) - 1)[:, -length:]
        if front.uneven:  # a row of the base counts as the base does, its padding included
            own = front.per_row([s + p for s, p in zip(front.soft, front.keyed, strict=True)], device)[:, None]
            plain = torch.arange(length, device=device) + (past or front.P) - front.width
            made = torch.where(own == 0, plain, made)
        return made.clamp(min=0) + first

    def fill(self, cache: Cache, modules: Iterable[nn.Module], front: Front, dtype: torch.dtype) -> None:
        """Each layer's prefix into the cache; shared by the batch until the cache lays out its own memory."""
        own = getattr(cache, "self_attention_cache", cache)
        done: set[int] = set()
        for module in modules:
            layer = layer_of(module)
            if layer is None or layer in done or shares_keys(module):
                continue
            done.add(layer)
            device, shape = where(module), key_value_shape(module)
            parts: list[list[Tensor | None]] = []
            for methods in front.groups:
                pairs = [fitted(m("keys_values", layer), shape) for m in methods if m.keyed]
                parts.append([torch.cat([p[i] for p in pairs], 1) if pairs else None for i in (0, 1)])
            states = []
            for i in (0, 1):
                like = next(t for t in (part[i] for part in parts) if t is not None)
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
