"""Garbage collections put off while many objects are made, and none for good."""

from __future__ import annotations

import gc
import weakref

import pytest
from torch import nn

from peft.contract.cheap_modules import CheapModule, uninterrupted


def test_no_collection_while_many_objects_are_made_and_none_put_off_for_good():
    starts, alive = [], []
    watch = lambda phase, info: starts.append(info["generation"]) if phase == "start" else None  # noqa: E731
    gc.collect()
    gc.callbacks.append(watch)
    try:
        with uninterrupted():
            ring = [[] for _ in range(20_000)]
            for inner in ring:
                inner.append(ring)
            assert not starts
        del ring, inner
        for _ in range(300):  # garbage of the caller's, between blocks: collected without anyone asking for it
            cycle = type("Cycle", (), {})()
            cycle.me = cycle
            alive.append(weakref.ref(cycle))
            del cycle
            with uninterrupted():
                [[] for _ in range(1000)]
    finally:
        gc.callbacks.remove(watch)
    assert gc.isenabled() and starts
    assert sum(ref() is not None for ref in alive) < 150


def test_collections_stay_off_where_they_were_off_and_come_back_after_an_error():
    gc.disable()
    try:
        with uninterrupted():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(KeyError), uninterrupted(), uninterrupted():
        raise KeyError
    assert gc.isenabled()


def test_train_and_eval_reach_all_that_hangs_below_as_any_modules_do():
    outer, inner = CheapModule(), CheapModule()
    inner.plain = nn.Sequential(nn.Dropout(0.5))
    outer.inner, outer.nothing = inner, None
    outer._modules["empty"] = None
    holder = nn.Sequential(outer)
    assert holder.eval() is holder and not any(m.training for m in holder.modules())
    assert outer.train() is outer and all(m.training for m in outer.modules()) and not holder.training
    with pytest.raises(ValueError, match="expected to be boolean"):
        outer.train("yes")
