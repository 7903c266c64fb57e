"""One adapter per row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ...kernels.rows import Scratch

Groups: TypeAlias = tuple[list[tuple[str, Tensor]], Tensor]  # the positions of each adapter, and what undoes that
Places: TypeAlias = list[tuple[str, slice | Tensor]]


class Rows:
    """One adapter name per row of the batch; knows which positions of a layer's first axis belong to whom."""

    def __init__(self, names: Sequence[str], tokens: int | None = None) -> None:
        self.names = tuple(names)
        self.tokens = tokens  # tokens per row, when known: layers may see [rows * tokens, ...]
        self.distinct = tuple(dict.fromkeys(self.names))
        self.scratch = Scratch()
        self._ids = torch.tensor([self.distinct.index(n) for n in self.names])
        self._cache: dict[tuple[int, torch.device], Groups] = {}
        self._places: dict[tuple[int, int, torch.device], Places] = {}

    def __len__(self) -> int:
        return len(self.names)

    def groups(self, n: int, where: str, device: torch.device) -> Groups:
        """For a first axis of size n: the positions of each adapter, and the permutation that undoes the grouping."""
        key = (n, device)
        if key not in self._cache:
            self._cache[key] = self.of(self.row_of(n, where, device))
        return self._cache[key]

    def row_of(self, n: int, where: str, device: torch.device) -> Tensor:
        """For a first axis of size n: the row of the batch that each position belongs to."""
        b = len(self.names)
        if n != b and (n % b or (self.tokens is not None and n != b * self.tokens)):
            raise ValueError(
                f"adapter_names has {b} entries, but {where} sees {n} rows"
                + (f" ({self.tokens} tokens a row)" if self.tokens else "")
                + ": it cannot be told which row uses which adapter. Pass one name per row of the batch; layers "
                "that reorder rows cannot mix adapters within a batch."
            )
        return torch.arange(b, device=device).repeat_interleave(n // b)  # flattened tokens or beams: row-major

    def places(self, x: Tensor, path: str) -> Places:
        """Which of x's rows, flattened to `[..., channels]`, each adapter has: a slice where they lie together."""
        n, tokens = x.shape[0], x.shape[:-1].numel() // max(x.shape[0], 1)
        key = (n, tokens, x.device)
        if key not in self._places:
            self._places[key] = self.flat(self.groups(n, path, x.device)[0], tokens)
        return self._places[key]

    def places_of(self, row: Tensor, x: Tensor) -> Places:
        """As `places`, with the batch row of each of x's rows given."""
        return self.flat(self.of(row)[0], x.shape[:-1].numel() // max(x.shape[0], 1))

    @staticmethod
    def flat(groups: list[tuple[str, Tensor]], tokens: int) -> Places:
        out: Places = []
        for name, index in groups:
            first, last = (int(index[0]), int(index[-1])) if len(index) else (0, -1)
            if last - first + 1 == len(index):  # ascending by construction
                out.append((name, slice(first * tokens, (last + 1) * tokens)))
            else:
                out.append((name, (index[:, None] * tokens + torch.arange(tokens, device=index.device)).flatten()))
        return out

    def split(self, ids: Tensor) -> Groups:
        groups = [(name, (ids == k).nonzero().flatten()) for k, name in enumerate(self.distinct)]
        if not torch.is_grad_enabled():  # else adapters of the call without a row here get gradients of zero, not none
            groups = [(name, index) for name, index in groups if len(index)]
        order = torch.cat([index for _, index in groups]) if groups else ids
        return groups, torch.argsort(order)

    def of(self, row: Tensor) -> Groups:
        """The same for a layer that says which row of the batch each of its inputs belongs to."""
        return self.split(self._ids.to(row.device)[row])
