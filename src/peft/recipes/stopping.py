"""Stopping a training without losing steps, and the memory that it takes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeAlias

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import ranks
from .events import OnEvent, StopAsked, ignore

Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None  # of a signal


def memory() -> dict[str, int]:
    """Bytes: the process now and at its highest, and the accelerator's highest where there is one."""
    process = psutil.Process(os.getpid()).memory_info()
    peak = getattr(process, "peak_wset", process.rss)  # Windows
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = max(peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    found = {"now": process.rss, "peak": peak}
    if torch.cuda.is_available():
        found["accelerator_peak"] = torch.cuda.max_memory_allocated()
    return found


class Stopper(TrainerCallback):
    """Stops between two steps and saves there: on Ctrl-C or SIGTERM, or after a number of steps.

    A second Ctrl-C stops at once.
    """

    def __init__(self, after: int | None = None, on_event: OnEvent = ignore) -> None:
        self.after, self.asked, self.stopped, self.first = after, False, False, 0
        self.on_event = on_event
        self.kept: dict[int, Handler] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self.kept.get(number) or signal.SIG_DFL)
        self.on_event(StopAsked())

    def __enter__(self) -> Stopper:
        if threading.current_thread() is threading.main_thread():
            self.kept = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.kept.items():
            signal.signal(number, handler)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.first = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.asked = ranks.anywhere(self.asked)  # signals do not come everywhere in the same step
        due = self.after is not None and state.global_step - self.first >= self.after
        if (self.asked or due) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
