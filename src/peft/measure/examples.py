"""The user's data example by example, and what the base holds at a method's place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.method import Method
from ..contract.tree import tree
from ..core.acting.adapted_layer import AdaptedLayer


def examples_of(batch: Any) -> Iterator[Any]:
    """The examples of a batch (a tensor, or a dict or tuple of tensors), each as a batch of one."""
    if torch.is_tensor(batch):
        yield from batch.split(1)
    elif hasattr(batch, "items"):
        first = next(v for v in batch.values() if torch.is_tensor(v))
        for i in range(len(first)):
            yield {k: v[i : i + 1] if torch.is_tensor(v) else v for k, v in batch.items()}
    else:
        first = next(v for v in batch if torch.is_tensor(v))
        for i in range(len(first)):
            yield tuple(v[i : i + 1] if torch.is_tensor(v) else v for v in batch)


def originals(model: nn.Module) -> dict[Method, Callable[[], dict[str, Tensor]]]:
    """For every method in a model: its module's own parameters, as the base has them."""
    return {
        m: functools.partial(_parameters, layer)
        for layer in tree(model, wrappers=True)
        if isinstance(layer, AdaptedLayer)
        for methods in layer.methods.values()
        for m in methods
    }


def _parameters(layer: AdaptedLayer) -> dict[str, Tensor]:
    return layer.kind.parameters(layer.base_layer)
