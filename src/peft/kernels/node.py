"""What the autograd nodes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

Where: TypeAlias = slice | Tensor | None  # which rows of x a term is about; None: all


class Context(Protocol):
    """What torch gives a node's forward and backward; each node adds what it keeps."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def recorded() -> bool:
    """Whether a graph is recorded (compile, export, trace) or a function transformed (vmap, grad, jvp): values cannot be
    looked at, and what stands in the graph are plain operations."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def usable(x: Tensor) -> bool:
    """Whether a node may stand for the plain operations: outside of recordings, forward-mode derivatives, nested tensors
    and autocast (which would mix dtypes)."""
    if recorded() or not isinstance(x, Tensor) or not x.is_floating_point() or x.is_nested:
        return False
    if forward_ad._current_level >= 0:
        return False
    return not (torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type))


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


def with_zero_gradients(y: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """y, whose backward gives these parameters gradients of zero: what a call without input gives, without the call."""
    return _Touched.apply(y, *parameters) if parameters and forward_ad._current_level < 0 else y


class _Touched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return as_output(y.view(y.shape))

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], *map(torch.zeros_like, ctx.saved_tensors)
