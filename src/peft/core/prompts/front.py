"""What stands before the tokens of one call, and the arguments that must make room for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import Refusal
from ..forms.prompt import PromptMethod


# -- one call --------------------------------------------------------------------------------------------------------------
@dataclass
class Front:
    """What stands before the tokens of one call: groups of methods, and which group each row of the batch has."""

    rows: int
    groups: list[list[PromptMethod]]
    row: Tensor | None = None  # [rows]: index of the row's group; None: all rows have the first

    def __post_init__(self) -> None:
        self.soft = [sum(m.inputs for m in g) for g in self.groups]
        self.keyed = [sum(m.keyed for m in g) for g in self.groups]
        self.S, self.P = max(self.soft), max(self.keyed)
        self.uneven = len(set(zip(self.soft, self.keyed, strict=True))) > 1

    @property
    def width(self) -> int:
        return self.S + self.P

    def per_row(self, values: Sequence[int], device: torch.device) -> Tensor:
        """[rows]: each row's value."""
        table = torch.tensor(values, device=device)
        return table.expand(self.rows) if self.row is None else table[self.row.to(device)]

    def visible(self, lengths: Sequence[int], width: int, device: torch.device) -> Tensor:
        """[rows, width]: 1 where the front holds something, 0 where it is padding, which lies on the left."""
        return (torch.arange(width, device=device) >= width - self.per_row(lengths, device)[:, None]).long()

    def turn(self, t: Tensor, back: bool = False) -> Tensor:
        """Each row of t[rows, tokens, …] with the padding of its virtual tokens moved from the left to the end."""
        pads = self.per_row([self.S - s for s in self.soft], t.device)[:, None]
        index = (torch.arange(t.shape[1], device=t.device) + (-pads if back else pads)) % t.shape[1]
        return torch.gather(t, 1, index.reshape(*index.shape, *(1 for _ in t.shape[2:])).expand(t.shape))

    def choose(self, parts: list[Tensor]) -> Tensor:
        """Each row's own from one tensor [rows, …] per group."""
        if self.row is None:
            return parts[0]
        at = torch.arange(self.rows, device=parts[0].device)
        return torch.stack(parts)[self.row.to(parts[0].device), at]


# -- small things ----------------------------------------------------------------------------------------------------------------
def before(t: Tensor, n: int, fill: float) -> Tensor:
    """`t` with n columns of `fill` before its second axis."""
    return torch.cat([t.new_full((t.shape[0], n, *t.shape[2:]), fill), t], 1)


def batch(kwargs: dict[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels"):
        if torch.is_tensor(kwargs.get(name)):
            return int(kwargs[name].shape[0])
    return 1


def spread(values: list[Any], rows: int, what: str) -> list[Any]:
    """One value per row, where there is one per sequence of a beam search, or one per beam of its input."""
    if rows % len(values) == 0:
        return [v for v in values for _ in range(rows // len(values))]
    if len(values) % rows == 0:
        return values[:: len(values) // rows]
    raise ValueError(f"{what} has {len(values)} entries for {rows} rows: pass one per row of the batch.")


def seen(cache: Any) -> int:
    """Positions that a cache holds."""
    return int(cache.get_seq_length()) if cache is not None else 0


def flat_mask(mask: Any, length: int) -> Tensor | None:
    """The mask as [rows, length]. Generation with a cache of fixed size hands over the full one, made from it."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None or mask.dim() == 2:
        return mask
    last = mask[:, 0, -1, :length]
    flat = last if last.dtype == torch.bool else last == 0
    causal = torch.ones_like(mask[:, 0], dtype=torch.bool).tril(length - mask.shape[2])[..., :length]
    full = mask[:, 0, :, :length] if mask.dtype == torch.bool else mask[:, 0, :, :length] == 0
    if not torch.compiler.is_compiling() and not torch.equal(full & flat[:, None], causal & flat[:, None]):
        raise ValueError(
            "attention_mask has a shape of its own [rows, heads, queries, keys], in which virtual tokens have no place: "
            "pass a mask [rows, tokens]."
        )
    return flat.long()


def refuse_packed(positions: Tensor | None, mask: Any, past: int) -> None:
    """Several texts in one row would all see a prompt that stands before the first."""
    if positions is None or mask is not None or past or torch.compiler.is_compiling():
        return
    if bool((positions.diff(dim=-1) < 0).any()):
        raise ValueError(
            "position_ids start again within a row (packed texts, no attention_mask): virtual tokens stand before the "
            "row's first text only. Pass one text per row, padded, for prompt methods."
        )


def refuse_gap(stack: nn.Module, cache: Any, front: Front) -> None:
    """In a window, the padding between a row's prefix and its text would count as distance."""
    apart = any(p and s < front.S for s, p in zip(front.soft, front.keyed, strict=True))
    if apart and any(getattr(cache, "is_sliding", ())):
        raise Refusal(
            "adapter_names",
            type(stack).__name__,
            "its attention has a window, in which the room for other rows' virtual tokens would push this row's prefix "
            "further away. Put rows with prefixes and rows with prompts into different batches.",
        )
