"""Several processes in one run: one speaks and writes, all end together, the figures are those of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peft.recipes import ranks
from tests.helpers.small_models import causal, peft

__all__ = ["peft"]


def test_a_process_alone_is_first_and_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.is_first() and ranks.speaks() and ranks.count() == 1 and ranks.gathered(3) == [3]
    assert ranks.on_first(lambda: "x") == "x" and ranks.anywhere(True) and not ranks.anywhere(False)
    with pytest.raises(ZeroDivisionError), ranks.agreed():
        _ = 1 / 0
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ranks.is_first(), "a launcher says LOCAL_RANK, too"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not ranks.is_first() and ranks.count() == 2 and not ranks.speaks()


def test_scores_of_shares_are_those_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [{"accuracy": 1.0, "loss": 2.0, "rows": 3}, {"accuracy": 0.0, "loss": 6.0, "rows": 1}, None]
    monkeypatch.setattr(ranks, "gathered", lambda _: parts)
    assert ranks.pooled(parts[0]) == {"accuracy": 0.75, "loss": 3.0, "rows": 4}
    parts[1] = {"accuracy": float("nan"), "loss": float("nan"), "rows": 0}
    assert ranks.pooled(parts[0]) == parts[0]


@pytest.mark.slow
def test_two_processes_are_one_run(peft: Any, home: Path, tmp_path: Path) -> None:
    """Stopped, gone on with, finished and refused under torchrun; the files and figures are those of one process."""
    Path("job.yaml").write_text("data: {limit: 40}")
    usual = ["train", "job.yaml", *map(str, causal(home)[1:])]
    two = [*usual, "--output", "two", "--trainer", "per_device_train_batch_size=4"]
    missing = [v if v != str(home / "train.jsonl") else "missing.jsonl" for v in two]
    Path("commands.json").write_text(
        json.dumps([[[*two, "--stop-after", "3"]], [two], [two], [[*two, "--restart"], missing]])
    )
    worker = Path(__file__).with_name("ranks_worker.py")
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(worker), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert launched.returncode == 0, launched.stdout + launched.stderr
    first, second = (json.loads(Path(f"found-{rank}.json").read_text()) for rank in range(2))
    assert [f["code"] for f in first] == [f["code"] for f in second] == [0, 0, 2, 2], (first, second)
    stopped, finished, refused, failed = (a["said"] + b["said"] for a, b in zip(first, second))
    assert stopped.count("Stopped after step 3 of 10") == 1
    assert finished.count("Going on from step 3 of 10.") == 1 and finished.count("rank of the update") == 1
    assert finished.count("2 processes × 4 rows = 8 rows a step") == 1 and finished.count("\nstep 10/10 ") == 1
    assert second[0]["said"] == second[1]["said"] == ""
    assert refused.count("Error:") == failed.count("Error:") == 1
    assert "two holds a finished run" in refused and "missing.jsonl" in failed
    assert first[2]["folder"] == first[3]["folder"] == first[1]["folder"], "what failed has changed nothing"

    peft(*usual, "--output", "one", "--trainer", "per_device_train_batch_size=8")
    assert sorted(p.name for p in Path("two").iterdir()) == sorted(p.name for p in Path("one").iterdir())
    one, both = (json.loads(Path(run, "metrics.json").read_text()) for run in ("one", "two"))
    assert both["processes"] == 2 and both["rows_of_a_step"] == one["rows_of_a_step"] == 8
    for when in ("before", "after"):
        assert both[when] == pytest.approx(one[when], abs=1e-5)
    losses = [[h["loss"] for h in run["history"] if "loss" in h] for run in (one, both)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and len(losses[0]) == 10
    expected, found = (load_file(Path(run, "adapter", "adapter_model.safetensors")) for run in ("one", "two"))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=2e-5, rtol=1e-4)
