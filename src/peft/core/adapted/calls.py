"""How a layer is called: its arguments and its main output, nested tensors, the hooks that record what it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Args: TypeAlias = tuple[Any, ...]  # the arguments of a call by position
Kwargs: TypeAlias = dict[str, Any]  # and by name
Output: TypeAlias = Tensor | tuple[Any, ...] | list[Any]  # a block's main output may come first of several


def nested(x: object) -> bool:
    """Whether x is a jagged nested tensor."""
    return isinstance(x, Tensor) and x.is_nested and x.layout is torch.jagged


def over_sequences(x: Any, fn: Callable[[Tensor], Output]) -> Output:
    """`fn` of the rows of a jagged nested tensor, which lie one sequence after the other, as a nested tensor again."""
    offsets, lengths, axis = x.offsets(), x.lengths(), x._ragged_idx
    return on_first(
        fn(x.values()), lambda y: torch.nested.nested_tensor_from_jagged(y, offsets, lengths, jagged_dim=axis)
    )


def sequence_of(x: Any) -> Tensor:
    """Which sequence of a jagged nested tensor each of its rows belongs to."""
    offsets, rows = x.offsets(), x.values().shape[0]
    return torch.searchsorted(offsets[1:], torch.arange(rows, device=offsets.device), right=True)


def move_recorders(source: nn.Module, target: nn.Module) -> None:
    """Take over the hooks by which transformers records hidden states and attentions from modules of a class.

    They belong where the block's output leaves: on the wrapper, which gives the adapted output, and once per call.
    """
    for key, hook in list(source._forward_hooks.items()):
        if getattr(hook, "__module__", "") == "transformers.utils.output_capturing":
            target._forward_hooks[key] = source._forward_hooks.pop(key)


def on_first(out: Output, fn: Callable[[Tensor], Output]) -> Output:
    """`fn` applied to a block's main output, which may come first in a tuple."""
    if isinstance(out, (tuple, list)):
        return type(out)([fn(out[0]), *out[1:]])
    return fn(out)
