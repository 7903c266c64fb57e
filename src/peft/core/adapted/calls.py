"""How a layer is called: its arguments and its main output, attributes that stand before its parameters, the hooks that
record what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn

Args: TypeAlias = tuple[Any, ...]  # the arguments of a call by position
Kwargs: TypeAlias = dict[str, Any]  # and by name
Output: TypeAlias = Tensor | tuple[Any, ...] | list[Any]  # a block's main output may come first of several


@contextmanager
def over_attributes(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Within, plain attributes that stand before parameters of these names hold the values, too: FSDP 1 puts its views
    of flat parameters there, and they would win over what `functional_call` swaps in."""
    swapped = []
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner.__dict__:
            swapped.append((owner, leaf, owner.__dict__[leaf]))
            owner.__dict__[leaf] = value
    try:
        yield
    finally:
        for owner, leaf, before in swapped:
            owner.__dict__[leaf] = before


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
