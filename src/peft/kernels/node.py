"""What the autograd nodes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

Where: TypeAlias = slice | Tensor | None  # which rows of x a term is about; None: all


class Context(Protocol):
    """What torch gives a node's forward and backward; each node adds what it keeps."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def matrix(t: Tensor) -> Tensor:
    """[..., channels] as [rows, channels], to be read."""
    return t.reshape(-1, t.shape[-1])


def cast(factor: Tensor, x: Tensor) -> Tensor:
    return factor if factor.dtype is x.dtype else factor.to(x.dtype)


def column_sums(t: Tensor) -> Tensor:
    """t.sum(0), sooner."""
    return t.new_ones(len(t)) @ t


def as_output(y: Tensor) -> Tensor:
    """The same memory, but no view: what follows a layer may write into its output in place, as into a plain layer's.

    Only for what no node has saved: the alias has a version of its own, so that such a write would not be seen.
    """
    return torch.ops.aten._unsafe_view.default(y, y.shape) if y._is_view() else y  # type: ignore[no-any-return]


def again(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """A node's gradients once more, so that they can be differentiated themselves: those of its formula in plain
    operations. The nodes' own steps use what forward computed, through which no second derivative flows.

    inputs: the formula's, which are the node's first argument and its last ones. needs, and the result: for all of the
    node's arguments.
    """
    between = len(needs) - len(inputs)
    asked = (needs[0], *needs[between + 1 :])
    wanted = [t for t, needed in zip(inputs, asked, strict=True) if needed]
    found = iter(torch.autograd.grad(formula(*inputs), wanted, dy, create_graph=True))
    dx, *others = [next(found) if needed else None for needed in asked]
    return (dx, *[None] * between, *others)
