"""Which tokens of a sequence a call holds, for methods that act on positions.

A layer sees vectors; that the fifth of them is padding, or that a key/value cache holds what came before, is known
only where token ids come in: see `watch`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """The tokens of one call: `rows` sequences of `length` tokens, after `offset` tokens that a cache holds."""

    rows: int
    length: int
    offset: int = 0
    number: Tensor | None = field(default=None, compare=False)  # [rows, length]: n-th real token of its row, -1 padding
    prompt: Tensor | None = field(default=None, compare=False)  # [rows, length]: lies before the row's first label
    outer: Span | None = field(default=None, compare=False)

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
