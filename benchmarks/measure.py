"""Clocks and counters. Times are wall times; on a busy machine `--clock cpu` counts the process's own time instead."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

clock = time.process_time if os.environ.get("BENCHMARK_CLOCK") == "cpu" else time.perf_counter


def seconds(run: Callable[[], Any], times: int = 1) -> float:
    """Of one call, as the mean over `times` calls in a row."""
    start = clock()
    for _ in range(times):
        run()
    return (clock() - start) / times


def once(run: Callable[[], Any]) -> float:
    """Seconds of one call that starts with no garbage to collect."""
    gc.collect()
    return seconds(run)


class Turns:
    """Times of several calls that took turns, one after the other, so that noise meets all of them alike."""

    def __init__(self, n: int, times: int = 1, **calls: Callable[[], Any]) -> None:
        self.of: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        gc.collect()
        for _ in range(n):
            for name, call in calls.items():
                self.of[name].append(seconds(call, times))

    def ratio(self, name: str, floor: str) -> float:
        """The median over the turns of time ÷ floor's time."""
        return statistics.median(a / b for a, b in zip(self.of[name], self.of[floor], strict=True))

    def median(self, name: str) -> float:
        return statistics.median(self.of[name])


def live_bytes(forward: Callable[[], Any]) -> int:
    """What the allocator handed out and did not get back while `forward` ran and its result (the graph) is held.

    This sees every block, whether a tensor is saved for backward, kept on an autograd node in another way, or held by
    anything else.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        held = forward()
    found = sum(e.nbytes() for e in run.profiler.kineto_results.events() if e.name() == "[memory]")
    del held
    return found


def saved_bytes(forward: Callable[[], Any]) -> int:
    """What saved-tensor hooks see: the storages of all tensors that went through `save_for_backward`, each once."""
    storages: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held = forward()
    del held
    return sum(s.nbytes() for s in storages.values())


def python_calls(run: Callable[[], Any]) -> int:
    """How many Python functions `run` enters: the work that grows with the model, whatever the machine."""
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count
