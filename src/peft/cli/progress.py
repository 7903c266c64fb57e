"""Progress of long work: bars on a terminal, a line now and then elsewhere; memory; stopping without losing steps."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import psutil
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from .console import console, size

T = TypeVar("T")
QUIET_SECONDS = 10  # how long to say nothing where there is no terminal


def bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
    )


def track(items: Sequence[T], title: str) -> Iterator[T]:
    """The items one by one, with progress."""
    if console.is_terminal:
        with bar() as progress:
            task = progress.add_task(title, total=len(items), note="")
            for item in items:
                yield item
                progress.advance(task)
        return
    said = time.monotonic()
    for at, item in enumerate(items):
        yield item
        if time.monotonic() - said > QUIET_SECONDS:
            said = time.monotonic()
            console.print(f"{title}: {at + 1}/{len(items)}")


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


class Reporter(TrainerCallback):
    """Steps, loss and memory while the Trainer runs."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.started = self.first = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started, self.first = time.monotonic(), state.global_step
        if console.is_terminal:
            self.progress = bar()
            self.task = self.progress.add_task("training", total=state.max_steps, completed=state.global_step, note="")
            self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        used = memory()
        parts = [f"step {state.global_step}/{state.max_steps}"]
        parts += [f"{name} {logs[name]:.4f}" for name in ("loss", "eval_loss") if name in logs]
        if len(parts) == 1:
            return
        if "learning_rate" in logs:
            parts.append(f"lr {logs['learning_rate']:.2e}")
        parts.append(f"memory {size(used.get('accelerator_peak', used['now']))}")
        pace = (time.monotonic() - self.started) / max(1, state.global_step - self.first)
        parts.append(f"{pace * (state.max_steps - state.global_step):.0f} s left")
        console.print("  ".join(parts))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class Stopper(TrainerCallback):
    """Stops between two steps and saves there: on Ctrl-C or SIGTERM, or after a number of steps.

    A second Ctrl-C stops at once.
    """

    def __init__(self, after: int | None = None) -> None:
        self.after, self.asked, self.stopped, self.first = after, False, False, 0
        self.kept: dict[int, Any] = {}

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(number, self.kept.get(number) or signal.SIG_DFL)
        console.print("Stopping after this step; its state will be saved.")

    def __enter__(self) -> Stopper:
        if threading.current_thread() is threading.main_thread():
            self.kept = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.kept.items():
            signal.signal(number, handler)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        due = self.after is not None and state.global_step - self.first >= self.after
        if (self.asked or due) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
