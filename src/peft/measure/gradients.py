"""Squared gradients of a loss, example by example: of any tensors, or of whole parameters of the base through probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .examples import examples_of

Batch = TypeVar("Batch")  # of examples, or of one
K = TypeVar("K")


class Probed(Protocol):
    """A method that adds its `probes` to the parameters of its module that have these names."""

    shapes: dict[str, torch.Size]
    probes: dict[str, Tensor]

    def parameters(self) -> Iterator[nn.Parameter]: ...


@contextmanager
def probing(methods: Mapping[str, Probed]) -> Iterator[dict[tuple[str, str], Tensor]]:
    """Probes for every parameter of some methods' modules: zeros whose gradients are those of the parameters.

    So the base's own parameters need no gradients. By (path of the method, name of the parameter); gone afterwards.
    """
    try:
        for method in methods.values():
            device = next(method.parameters()).device
            method.probes = {n: torch.zeros(s, device=device, requires_grad=True) for n, s in method.shapes.items()}
        yield {(path, n): p for path, method in methods.items() for n, p in method.probes.items()}
    finally:
        for method in methods.values():
            method.probes = {}


def squared_gradients(
    model: nn.Module,
    tensors: Mapping[K, Tensor],
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
    num_samples: int = 1024,
) -> dict[K, Tensor]:
    """Σ (∂ loss/∂t)² over examples, for each of the tensors, with the model in evaluation mode.

    batches: tensors, or dicts or tuples of tensors, with examples along the first axis; each example is differentiated
    alone, as a batch of one, up to num_samples of them. loss: `loss(model, example)`, by default `model(**example).loss`.
    """
    loss = loss or _own_loss
    sums = {key: torch.zeros_like(t) for key, t in tensors.items()}
    count, was_training = 0, model.training
    try:
        model.eval()
        for example in islice((e for batch in batches for e in examples_of(batch)), num_samples):
            grads = torch.autograd.grad(loss(model, example), list(tensors.values()), allow_unused=True)
            for total, g in zip(sums.values(), grads, strict=True):
                if g is not None:
                    total += g**2
            count += 1
    finally:
        model.train(was_training)
    if not count:
        raise ValueError("`batches` holds no examples, and gradients need some: pass at least one batch.")
    return sums


def _own_loss(model: nn.Module, example: Any) -> Tensor:
    return model(**example).loss
