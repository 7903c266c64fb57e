"""Some rows of a weight, of a table that is looked up or of a matrix: chosen, read, put in, and what a change of them does."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...contract.geometry import Geometry
from ...contract.site import Op


class ChoosesRows(Protocol):
    """A config that says of each site which rows train, and whether they start from those of the weight."""

    init_weights: bool

    def indices_at(self, path: str) -> list[int]: ...


def check_rows(indices: object, field: str, what: str) -> None:
    """Raise a clear error unless these are different numbers of rows; what: what the rows are for the user."""
    some = indices if isinstance(indices, (list, tuple)) else ()
    whole = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in some)
    if not some or not whole or len(set(some)) != len(some):
        raise ValueError(f"`{field}` should be a list of different {what} from 0 on, but got {indices!r}.")


def rows_of(W: Tensor, indices: list[int], geometry: Geometry) -> Tensor:
    """[n, width]: these rows of a table that is looked up, which are columns of its W, or of a matrix W."""
    return (W.T if geometry.indexed else W)[indices].detach()


def with_rows(W: Tensor, indices: list[int], rows: Tensor, geometry: Geometry) -> Tensor:
    """W with `rows` in their place."""
    at, rows = torch.tensor(indices, device=W.device), rows.to(W.dtype)
    return W.index_copy(1, at, rows.T) if geometry.indexed else W.index_copy(0, at, rows)


def add_rows(x: Tensor, y: Tensor, op: Op, at: Tensor, change: Tensor) -> Tensor:
    """The layer's output y for x, with `change`[n, width] added to the rows `at`[n] (ascending) of its weight.

    Only those rows are computed with: a lookup goes to a small table of them, a matrix gets n outputs added. Groups of
    channels take a whole weight.
    """
    geometry = op.geometry
    if geometry.indexed:  # the changed rows in the order of their numbers, then rows of zeros
        n = len(at)
        zeros = change.new_zeros(2 if n + 1 == geometry.fan_in else 1, change.shape[1])
        place = torch.searchsorted(at, x).clamp(max=n - 1)
        place = torch.where(at[place] == x, place, n)
        return y + op(place, torch.cat([change, zeros]).T.to(y.dtype))
    if not geometry.factored:
        W = change.new_zeros(geometry.out, change.shape[1])
        return y + op(x, W.index_copy(0, at, change).to(y.dtype))
    last = op.kind.channels_last(y)
    outputs = op.kind.channels_last(op(x, change.to(y.dtype)))
    return op.kind.channels_back(last.index_add(-1, at, outputs.to(last.dtype)))
