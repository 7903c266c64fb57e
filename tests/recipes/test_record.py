"""What a run leaves: counts, plot, versions, files that are whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import peft
from peft.recipes import record
from peft.recipes.events import Event, NoPlot


def test_counts_are_kept_apart() -> None:
    found = record.counts(peft.Counts(trainable=10, updated=45, total=100, rank=4, ranks={"a": 4, "b": 4, "c": 2}))
    assert found == {
        "trainable": 10,
        "total": 100,
        "trainable_percent": 10.0,
        "updated": 45,
        "updated_percent": 50.0,
        "rank": 4,
        "layers_by_rank": {"4": 2, "2": 1},
    }


def test_the_loss_is_drawn_where_there_is_one(tmp_path: Path) -> None:
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}]
    assert record.plot(history, tmp_path / "loss.png", "title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not record.plot([{"step": 1, "epoch": 1.0}], tmp_path / "none.png", "title")
    assert not (tmp_path / "none.png").exists()


def test_without_matplotlib_the_missing_plot_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    told: list[Event] = []
    assert not record.plot([{"step": 1, "loss": 2.0}], tmp_path / "loss.png", "title", told.append)
    assert told == [NoPlot("matplotlib")]


def test_the_record_is_json_and_its_size_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    file.write_text(record.as_json({"a": 1, "where": Path("x")}))
    assert json.loads(file.read_text()) == {"a": 1, "where": "x"}
    assert record.folder_size(tmp_path) == file.stat().st_size
    assert record.versions()["torch"] != "unknown"
