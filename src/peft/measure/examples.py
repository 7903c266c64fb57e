"""The user's data example by example."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


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
