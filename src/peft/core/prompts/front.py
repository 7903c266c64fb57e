"""What stands before the tokens of one call.

Several active methods stand side by side, in activation order. Rows of a batch may have different ones: the shorter
fronts are padded and masked, and positions are counted per row. The padding lies on the left, where generation wants
it, and so does the text's own, before the virtual tokens; in bidirectional encoders, whose heads read the first position, it lies behind the text: a row of the mixed batch
ends, or in encoders begins, with what the row gives alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..forms.prompt import PromptMethod


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

    def order(self, mask: Tensor | None, length: int, trailing: bool) -> Tensor | None:
        """[rows, length]: which column of [virtual tokens; text] stands at each place of a row; None: all as they are.

        mask[rows, tokens] is the text's. Its padding on the left goes before the virtual tokens; between them and the
        text it would count in distances, in windows and in the state of recurrent layers. Where padding lies behind
        the text (`trailing`), that of shorter fronts goes there.
        """
        if trailing:
            if not self.uneven or mask is None:
                return None
            pads = self.per_row([self.S - s for s in self.soft], mask.device)[:, None]
            return (torch.arange(length, device=mask.device) + pads) % length
        if mask is None:
            return None
        pads = (mask.cumsum(1) == 0).sum(1, keepdim=True)
        at = torch.arange(length, device=mask.device).expand(len(mask), -1)
        return torch.where(at < pads, at + self.S, torch.where(at < pads + self.S, at - pads, at))

    def choose(self, parts: list[Tensor]) -> Tensor:
        """Each row's own from one tensor [rows, …] per group."""
        if self.row is None:
            return parts[0]
        at = torch.arange(self.rows, device=parts[0].device)
        return torch.stack(parts)[self.row.to(parts[0].device), at]
