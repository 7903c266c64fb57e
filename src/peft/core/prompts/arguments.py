"""The arguments of a call of a model: read by name, widened, and refused where virtual tokens have no place in them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from ...errors import Refusal
from ...kernels.node import recorded
from .front import Front

if TYPE_CHECKING:
    from transformers import Cache

Arguments: TypeAlias = dict[str, Any]  # of one call, by name
Call: TypeAlias = tuple[tuple[()], Arguments]  # the arguments that a hook puts in the place of the caller's
T = TypeVar("T")


def before(t: Tensor, n: int, fill: float) -> Tensor:
    """`t` with n columns of `fill` before its second axis."""
    return torch.cat([t.new_full((t.shape[0], n, *t.shape[2:]), fill), t], 1)


def taken(t: Tensor, index: Tensor) -> Tensor:
    """t[rows, columns, …] with the columns index[rows, columns] of each row."""
    return torch.gather(
        t, 1, index.to(t.device).reshape(*index.shape, *(1 for _ in t.shape[2:])).expand(*index.shape, *t.shape[2:])
    )


def tokens_of(kwargs: Arguments) -> Tensor:
    """What the call's text is: vectors [rows, tokens, d] where it has them, else ids [rows, tokens]."""
    vectors: Tensor | None = kwargs.get("inputs_embeds")
    return kwargs["input_ids"] if vectors is None else vectors


def batch(kwargs: Arguments) -> int:
    """How many rows a call has."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels"):
        if torch.is_tensor(kwargs.get(name)):
            return int(kwargs[name].shape[0])
    return 1


def spread(values: list[T], rows: int, what: str) -> list[T]:
    """One value per row, where there is one per sequence of a beam search, or one per beam of its input."""
    if rows % len(values) == 0:
        return [v for v in values for _ in range(rows // len(values))]
    if len(values) % rows == 0:
        return values[:: len(values) // rows]
    raise ValueError(f"{what} has {len(values)} entries for {rows} rows: pass one per row of the batch.")


def seen(cache: Cache | None) -> int:
    """Positions that a cache holds."""
    return int(cache.get_seq_length()) if cache is not None else 0


def recount(kwargs: Arguments) -> None:
    """`cache_position` of generation in transformers before 5.3 does not count virtual tokens; without it, models count
    from the cache's length."""
    kwargs.pop("cache_position", None)


def flat_mask(mask: Tensor | dict[str, Tensor] | None, length: int) -> Tensor | None:
    """The mask as [rows, length]. Generation with a cache of fixed size hands over the full one, made from it."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None or mask.dim() == 2:
        return mask
    last = mask[:, 0, -1, :length]
    flat = last if last.dtype == torch.bool else last == 0
    causal = torch.ones_like(mask[:, 0], dtype=torch.bool).tril(length - mask.shape[2])[..., :length]
    full = mask[:, 0, :, :length] if mask.dtype == torch.bool else mask[:, 0, :, :length] == 0
    if not recorded() and not torch.equal(full & flat[:, None], causal & flat[:, None]):
        raise ValueError(
            "attention_mask has a shape of its own [rows, heads, queries, keys], in which virtual tokens have no place: "
            "pass a mask [rows, tokens]."
        )
    return flat.long()


def refuse_packed(positions: Tensor | None, mask: object, past: int) -> None:
    """Several texts in one row would all see a prompt that stands before the first."""
    if positions is None or mask is not None or past or recorded():
        return
    if bool((positions.diff(dim=-1) < 0).any()):
        raise ValueError(
            "position_ids start again within a row (packed texts, no attention_mask): virtual tokens stand before the "
            "row's first text only. Pass one text per row, padded, for prompt methods."
        )


def warn_of_window(cache: Cache | None, mask: Tensor | None, width: int) -> None:
    """A window counts columns: with padding between them, a text sees its prefix a little less far than alone."""
    found = [getattr(x, "sliding_window", None) for x in getattr(cache, "layers", ())]
    windows = [w for w in found if isinstance(w, int)]
    if not windows or mask is None or mask.shape[1] + width <= min(windows) or torch.compiler.is_compiling():
        return
    if bool((mask[:, 0] == 0).any()):
        warnings.warn(
            f"Attention has a window of {min(windows)} and the batch is padded on the left: in padded rows, the last "
            "tokens that would just see the prefix do not. Texts of one length, or one per batch, are exact.",
            stacklevel=2,
        )


def refuse_gap(stack: nn.Module, cache: object, front: Front) -> None:
    """In a window, the padding between a row's prefix and its text would count as distance."""
    apart = any(p and s < front.S for s, p in zip(front.soft, front.keyed, strict=True))
    if apart and any(getattr(cache, "is_sliding", ())):
        raise Refusal(
            "adapter_names",
            type(stack).__name__,
            "its attention has a window, in which the room for other rows' virtual tokens would push this row's prefix "
            "further away. Put rows with prefixes and rows with prompts into different batches.",
        )
