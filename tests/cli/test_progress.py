"""Bars on a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from peft.cli import progress
from peft.cli.progress import Bar


def made(terminal: bool) -> tuple[Bar, io.StringIO]:
    out = io.StringIO()
    return Bar(Console(file=out, force_terminal=terminal, width=100)), out


def test_elsewhere_a_line_comes_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    bar, out = made(False)
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    for done in range(6):
        bar.move("scoring", done, 9)
        bar.move("training", done, 9, lines=False)
        now += 6
    bar.close()
    assert out.getvalue() == "scoring: 2/9\nscoring: 4/9\n"


def test_on_a_terminal_one_thing_is_shown_at_a_time() -> None:
    bar, out = made(True)
    bar.spin("loading")
    assert bar.spinner is not None
    bar.move("scoring", 0, 9)
    assert bar.spinner is None and bar.progress is not None
    bar.move("scoring", 4, 9)
    assert bar.progress.tasks[0].completed == 4 and bar.progress.tasks[0].total == 9
    bar.close()
    bar.close()
    assert bar.progress is None and "scoring" in out.getvalue()
