"""Which tokens of a sequence a call holds, for methods that act on positions.

A layer sees vectors; that the fifth of them is padding, or that a key/value cache holds what came before, is known
only where token ids come in: see `watch`.

Which tokens are the first p and the last s of a sequence (`Span.ends`), padding not counted:
- the first p are counted from the start of the sequence, whatever a key/value cache already holds;
- the last s are those of the call that starts a sequence. A decoding step continues it: it has none. A call that
  continues a sequence with several tokens might end the prompt or not, so it is refused;
- where the prompt is asked for and labels say where it ends (the tokens before the first label), it is the sequence
  whose ends count, so that training acts where generation acts. Decoding without a cache cannot know that end.
Elsewhere (images, modules outside a language model) a call holds whole sequences: positions count along all axes
between the batch and the channels, and an output without such an axis is one position.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Span:
    """The tokens of one call: `rows` sequences of `length` tokens, after `offset` tokens that a cache holds."""

    rows: int
    length: int
    offset: int = 0
    number: Tensor | None = field(default=None, compare=False)  # [rows, length]: n-th real token of its row, -1 padding
    prompt: Tensor | None = field(default=None, compare=False)  # [rows, length]: lies before the row's first label
    outer: Span | None = field(default=None, compare=False)

    @classmethod
    def of(cls, y: Tensor, known: Span | None) -> Span:
        """The span of y[rows, ..., channels]: the known one if y are its tokens, else that of whole sequences."""
        return cls(y.shape[0], y.shape[1:-1].numel()) if known is None or not known.fits(y) else known

    def ends(
        self, prefix_positions: int, suffix_positions: int, device: torch.device, *, of_prompt: bool, method: str
    ) -> tuple[Tensor, Tensor]:
        """Which tokens are the first p and which the last s of their sequences: two masks [rows, length].

        of_prompt: of the prompts, where they are known. method: who asks, for the error in a call whose last tokens may
        or may not end the prompt.
        """
        number = self.numbers(device)
        inside = number >= 0
        if self.offset:
            if suffix_positions and self.length > 1:
                raise ValueError(
                    f"{method} with suffix_positions={suffix_positions}: this call continues a cached sequence with "
                    f"{self.length} tokens, and whether the prompt ends with them cannot be known. Pass the whole prompt "
                    "in one call, or use prefix positions only."
                )
            return inside & (number < prefix_positions), torch.zeros_like(inside)
        if of_prompt and self.prompt is not None:
            prompt = self.prompt.to(device)
            inside = inside & (prompt | ~prompt.any(1, keepdim=True))
        ends = F.pad(torch.where(inside, number + 1, 0), (1, 0))  # the 0 for rows without a token
        end = ends.amax(1, keepdim=True)
        return inside & (number < prefix_positions), inside & (number >= end - suffix_positions)

    def numbers(self, device: torch.device) -> Tensor:
        """[rows, length]: each token's place among the real tokens of its row, from 0; -1 for padding."""
        if self.number is not None:
            return self.number.to(device)
        return torch.arange(self.offset, self.offset + self.length, device=device).expand(self.rows, -1)

    def fits(self, y: Tensor) -> bool:
        """Whether the first axes of y are this span's tokens: [rows, length, channels], or flattened to two axes."""
        if y.dim() == 2:
            return y.shape[0] == self.rows * self.length
        return y.dim() == 3 and tuple(y.shape[:2]) == (self.rows, self.length)

    def take(self, index: Tensor, axis: int) -> Span:
        """The span of some rows; `index` selects from a first axis of size `axis`, which may hold flattened tokens."""
        if axis == self.rows * self.length != self.rows:
            index = index.reshape(-1, self.length)[:, 0] // self.length
        elif axis != self.rows:
            return self
        number, prompt = (None if t is None else t.to(index.device)[index] for t in (self.number, self.prompt))
        return replace(self, rows=len(index), number=number, prompt=prompt)
