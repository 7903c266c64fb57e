"""Frozen banks that adapters of one model have in common: equal values lie in one storage, and are written by nobody.

Within an adapter all sites hold one parameter (`Method.shared_tensors`). Two adapters of equal size and seed draw equal
banks, and those that were read from files are equal or not: what counts is the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...contract.method import Method
from ..acting.roster import Adapter, Roster, Table
from ..files.keys import FileTensor, assign


def together(roster: Roster, adapter: Adapter) -> None:
    """Let the adapter hold the banks of another one where they are equal, bit for bit."""
    own = _banks(adapter)
    if not own:
        return
    known = [bank for other in roster.adapters.values() if other is not adapter for bank in _banks(other)]
    for bank in own:
        found = next((k for k in known if k is not bank and _equal(k, bank)), None)
        if found is not None:
            _put(adapter, bank, found)


def apart(roster: Roster, adapter: Adapter) -> None:
    """Give the adapter banks of its own where another one holds them, too: they are about to be written."""
    own = _banks(adapter)
    if not own:
        return
    others = {id(bank) for other in roster.adapters.values() if other is not adapter for bank in _banks(other)}
    for bank in own:
        if id(bank) in others:
            _put(adapter, bank, nn.Parameter(bank.detach().clone(), requires_grad=False))


@contextmanager
def rewriting(roster: Roster, adapter: Adapter) -> Iterator[None]:
    """Within, an adapter that is in the model may be written: no call is under way, and its banks are its own."""
    with roster.gate.change():
        apart(roster, adapter)
        try:
            yield
        finally:
            together(roster, adapter)


def refill(roster: Roster, adapter: Adapter, pairs: dict[str, tuple[FileTensor, Tensor]]) -> None:
    """Write a file's values into an adapter that is in the model."""
    with rewriting(roster, adapter):
        assign(pairs, adapter)


def _banks(adapter: Adapter) -> list[nn.Parameter]:
    """The frozen parameters that stand below the model in a file, each once."""
    return list({id(p): p for table, name in _places(adapter) if (p := table[name]) is not None}.values())


def _places(adapter: Adapter) -> Iterator[tuple[Table, str]]:
    if not adapter.shared:
        return
    for _, outer in adapter.methods:
        for m in outer.nested():
            for name in _shared(m):
                if m._parameters.get(name) is not None:
                    yield m._parameters, name


def _shared(method: Method) -> Iterator[str]:
    return (name for name, stored in method.tensors.items() if stored.shared and stored.frozen)


def _equal(a: nn.Parameter, b: nn.Parameter) -> bool:
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and not a.is_meta
    return alike and type(a) is type(b) is nn.Parameter and torch.equal(a, b)


def _put(adapter: Adapter, old: nn.Parameter, new: nn.Parameter) -> None:
    for table, name in _places(adapter):
        if table[name] is old:
            table[name] = new
    adapter.shared.update({n: new for n, p in adapter.shared.items() if p is old})
