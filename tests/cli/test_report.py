"""Events as lines and tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft.cli import console as shared
from peft.cli.report import Report, counts, dry_run, lines, logged, outcome, scores
from peft.recipes import events

PLAN = events.Plan(
    "lora", "base", "causal_lm", tuple(events.Target(f"layers.{i}.q", "linear", (4, 4), 16) for i in range(3)), 1000, 9
)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.console, "width", 200)


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (events.RowsRead(42, None), "42 rows to train on, none held out"),
        (events.RowsRead(42, 12), "42 rows to train on, 12 held out"),
        (
            events.Adopted(Path("run")),
            "run was written by an earlier version, which kept no list of its files: they stay, also those that are used up.",
        ),
        (events.GoingOn(3, 9), "Going on from step 3 of 9."),
        (events.BaseScored({"accuracy": 0.5, "rows": 12}), "base held-out accuracy 0.5000"),
        (events.StopAsked(), "Stopping after this step; its state will be saved."),
        (events.Stopped(3, 9, True), "Stopped after step 3 of 9. The same command goes on from there."),
        (events.NoPlot("matplotlib"), "No loss plot: matplotlib is not installed (pip install matplotlib)."),
    ],
)
def test_events_that_take_a_line(event: events.Event, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(event) == [line]
    Report()(event)
    assert capsys.readouterr().out == line + "\n"


def test_logs_are_a_line_where_there_is_a_loss() -> None:
    numbers = {"loss": 1.25, "learning_rate": 1e-3, "grad_norm": 2.0}
    found = logged(events.Logged(3, 9, numbers, {"now": 2_000_000}, 7.6))
    assert found == ["step 3/9  loss 1.2500  lr 1.00e-03  memory 2.0 MB  8 s left"]
    assert logged(events.Logged(9, 9, {"train_runtime": 1.0}, {"now": 1}, 0.0)) == []


def test_layers_that_differ_in_their_number_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Report()(PLAN)
    said = capsys.readouterr().out
    assert "What lora adapts in base (causal_lm)" in said and "layers.*.q" in said and "layers.0.q" not in said
    Report(every=True)(PLAN)
    assert all(f"layers.{i}.q" in said for said in [capsys.readouterr().out] for i in range(3))
    dry_run(PLAN)
    assert "48 new parameters beside 1,000 of the base (4.8000 %), 9 steps" in capsys.readouterr().out


def test_work_that_is_shown_on_terminals_only_prints_nothing_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with Report() as report:
        for event in (
            events.Began("x"),
            events.Ended("x"),
            events.Step(0, 9),
            events.Step(1, 9),
            events.TrainingEnded(),
        ):
            report(event)
        for done in range(3):
            report(events.Progress("scoring", done, 2))
    assert capsys.readouterr().out.strip() == ""


def test_the_outcome_names_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        "counts": {
            "trainable": 10,
            "total": 100,
            "trainable_percent": 10.0,
            "updated": 45,
            "updated_percent": 50.0,
            "rank": None,
            "layers_by_rank": {},
        },
        "adapter_bytes": 1234,
        "before": {"accuracy": 0.5, "rows": 12},
        "after": {"accuracy": 0.75, "rows": 12},
        "memory_bytes": {"now": 1, "peak": 2_000_000},
        "seconds": {"total": 90.0},
    }
    rows = dict(outcome(events.Finished(found, Path("run/adapter"), Path("run/metrics.json"), None)))
    assert rows["held-out accuracy"] == "0.5000 → 0.7500" and rows["adapter"].endswith("(1.2 kB)")
    assert rows["rank of the update"] == "no single rank" and rows["time"] == "1.5 min" and rows["loss plot"] is None
    assert scores(None, None) == [] and len(counts(found["counts"])) == 3
    Report()(events.Answered((("how [is] it? ", "fine"),)))
    assert "how [is] it? fine" in capsys.readouterr().out
