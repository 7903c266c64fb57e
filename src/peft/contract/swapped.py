"""A module's own forward, run with other tensors in the place of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def called_with(module: nn.Module, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """module(*args, **kwargs) with `values` in the place of its parameters and buffers of these names."""
    with _over_attributes(module, values):
        if not torch.jit.is_tracing():
            return torch.func.functional_call(module, values, args, kwargs)
        with _in_tables(module, values):  # `functional_call` refuses to be traced
            return module(*args, **kwargs)


@contextmanager
def _over_attributes(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
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


@contextmanager
def _in_tables(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Within, the tables of parameters and buffers hold the values, under every name of a tied tensor."""
    tables: list[dict[str, Any]] = [t for m in module.modules() for t in (m._parameters, m._buffers)]
    new = {}
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        new[id(owner._parameters.get(leaf, owner._buffers.get(leaf)))] = value
    before = [dict(t) for t in tables]
    try:
        for table in tables:
            table.update({n: new[id(t)] for n, t in table.items() if t is not None and id(t) in new})
        yield
    finally:
        for table, held in zip(tables, before, strict=True):
            table.update(held)
