"""Bars on a terminal; elsewhere a line now and then."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.status import Status

QUIET_SECONDS = 10  # how long to say nothing where there is no terminal


class Bar:
    """At most one bar, or one spinner for work of unknown length: what is shown begins, moves and ends as it is told."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None
        self.spinner: Status | None = None
        self.said = 0.0

    def spin(self, title: str) -> None:
        """Shows that something is going on, on a terminal."""
        self.close()
        self.spinner = self.console.status(title)
        self.spinner.start()

    def move(self, title: str, done: int, total: int, *, lines: bool = True) -> None:
        """Shows that `done` of `total` is reached. lines: say so in a line now and then where there is no terminal."""
        if not self.console.is_terminal:
            if done == 0:
                self.said = time.monotonic()
            elif lines and time.monotonic() - self.said > QUIET_SECONDS:
                self.said = time.monotonic()
                self.console.print(f"{title}: {done}/{total}")
            return
        if self.progress is None:
            self.close()
            self.progress = self._bar()
            self.task = self.progress.add_task(title, total=total, completed=done)
            self.progress.start()
        self.progress.update(self.task, completed=done)

    def close(self) -> None:
        """Takes away what is shown."""
        for shown in (self.progress, self.spinner):
            if shown is not None:
                shown.stop()
        self.progress = self.spinner = None

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
