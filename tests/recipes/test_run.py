"""A run as a library: it tells events, returns values and prints nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft.errors import UserError
from peft.recipes import events
from peft.recipes.job import Data, Job
from peft.recipes.run import Run
from peft.recipes.trainers import supervised
from tests.helpers.small_models import TEMPLATE


def job(home: Path, output: Path, **more: Any) -> Job:
    data = Data(
        train=str(home / "train.jsonl"),
        eval=str(home / "heldout.jsonl"),
        template=TEMPLATE,
        choices=["complaint", "no complaint"],
    )
    config = {"r": 2, "target_modules": "all-linear", "layers_to_transform": "1"}
    return Job(
        model=str(home / "llama"), config=config, data=data, trainer={"max_steps": 4}, output=str(output), **more
    )


def kinds(told: list[events.Event]) -> list[type]:
    """The events' classes, repeated ones once."""
    found = [type(e) for e in told]
    return [c for at, c in enumerate(found) if at == 0 or found[at - 1] is not c]


def test_a_run_tells_what_it_does_and_prints_nothing(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[events.Event] = []
    run = Run(job(home, tmp_path / "run"), told.append)
    assert told == [events.RowsRead(42, 12)]
    plan = run.dry_run()
    assert isinstance(plan, events.Plan) and plan.task == "causal_lm" and plan.steps == 4
    assert all(t.path.startswith("model.layers.1.") and t.kind and t.shape for t in plan.targets)
    assert len(plan.targets) == 7 and 0 < plan.added < plan.base_parameters
    assert not (tmp_path / "run").exists() and len(told) == 1

    end = run.train(stop_after=2)
    assert end == events.Stopped(2, 4, asked=False) == told[-1]
    assert kinds(told)[:6] == [
        events.RowsRead,
        events.Began,
        events.Ended,
        events.Plan,
        events.Progress,
        events.BaseScored,
    ]
    assert plan in told and events.Step(2, 4) in told and events.GoingOn(2, 4) not in told

    told.clear()
    end = Run(job(home, tmp_path / "run"), told.append).train()
    assert events.GoingOn(2, 4) in told and events.BaseScored not in kinds(told)
    assert isinstance(end, events.Finished) and end in told and isinstance(told[-1], events.Answered)
    assert len(told[-1].rows) == 2 and all(asked.startswith("Tweet text") for asked, _ in told[-1].rows)
    assert end.adapter.is_dir() and end.metrics_file.is_file() and end.plot is not None and end.plot.is_file()
    assert end.metrics["steps"] == 4 and end.metrics["counts"]["trainable"] == plan.added
    assert [e.numbers["loss"] for e in told if isinstance(e, events.Logged) and "loss" in e.numbers]
    with pytest.raises(UserError, match="finished run"):
        Run(job(home, tmp_path / "run")).train()
    assert capsys.readouterr().out == ""


def test_a_sharded_base_is_scored_once_it_can_be_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that lie in pieces until the training begins: the base is the trained model with its adapter off."""
    whole = Run(job(home, tmp_path / "whole")).train()
    monkeypatch.setattr(supervised, "sharded", lambda args: True)
    monkeypatch.setattr(Run, "_score_base", before_training := Scoring(Run._score_base))
    end = Run(job(home, tmp_path / "run")).train()
    assert isinstance(whole, events.Finished) and isinstance(end, events.Finished)
    assert before_training.adapted == [True]
    for when in ("before", "after"):
        assert end.metrics[when] == pytest.approx(whole.metrics[when], abs=1e-6)
    assert end.metrics["history"][0]["loss"] == pytest.approx(whole.metrics["history"][0]["loss"], abs=1e-6)


class Scoring:
    """Notes which models are scored as the base: those that have an adapter, or do not."""

    def __init__(self, score: Any) -> None:
        self.score, self.adapted = score, []

    def __get__(self, run: Run, owner: type) -> Any:
        def call(output: Any, model: Any) -> None:
            self.adapted.append(hasattr(model, "peft_config"))
            self.score(run, output, model)

        return call
