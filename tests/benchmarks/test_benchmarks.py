"""The benchmark suite runs, writes what it says, and refuses to time libraries that compute different things."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measure, report, rows, session
from benchmarks.case import AHEAD, Case, at_least, at_most, faster, near

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_quick_run_writes_every_figure(tmp_path):
    out = tmp_path / "quick.json"
    command = [sys.executable, "-m", "benchmarks", "step", "inject", "--quick", "--upstream", "none", "--out", str(out)]
    library = str(session.our_library())
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": library}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert list(results["libraries"]) == ["ours"] and results["quick"]
    assert list(results["rows"]) == ["step", "inject"]
    for row, found in results["rows"].items():
        assert list(found["cases"]) == [case.name for case in rows.cases(row)]
        for case in rows.cases(row):
            figures = found["cases"][case.name]["figures"]
            assert list(figures) == list(case.figures)
            for figure in figures.values():
                assert figure["ours"]["samples"] and all(map(math.isfinite, figure["ours"]["samples"]))
    table = out.with_suffix(".md").read_text()
    assert all(found["title"] in table for found in results["rows"].values())


@pytest.mark.parametrize("row", rows.NAMES)
def test_a_row_says_what_it_measures(row):
    for quick in (False, True):
        cases = rows.cases(row, quick)
        assert len({c.name for c in cases}) == len(cases) > 0
        assert all(c.name and c.figures for c in cases)
    assert rows.module(row).TITLE and rows.module(row).__doc__
    assert any(figure.reach for case in rows.cases(row) for figure in case.figures.values())


def test_other_outputs_are_refused():
    case = Case()
    x = torch.randn(10)
    assert session.compare({"y": x}, {"y": x + 1e-7}, case)["same"]
    assert not session.compare({"y": x}, {"y": 1.001 * x}, case)["same"]
    assert not session.compare({"y": x}, {"z": x}, case)["same"]
    assert not session.compare({"y": x}, {"y": x[:5]}, case)["same"]
    assert not session.compare({"y": x * math.nan}, {"y": x * math.nan}, case)["same"]
    assert not session.compare({"y": 0 * x}, {"y": 0 * x}, case)["same"]


def test_random_outputs_are_compared_by_their_distribution():
    case = Case()
    case.draws = 30

    def drawn(shift: float, width: float) -> dict[str, torch.Tensor]:
        x = shift + width * torch.randn(case.draws, 2000)
        return {"mean y": x.mean(0), "var y": x.var(0)}

    assert session.compare(drawn(1, 0.5), drawn(1, 0.5), case)["same"]
    assert not session.compare(drawn(1, 0.5), drawn(1.3, 0.5), case)["same"]
    assert not session.compare(drawn(1, 0.5), drawn(1, 0.8), case)["same"]


class Hoarder(torch.autograd.Function):
    """Keeps a mebibyte where saved-tensor hooks do not see it."""

    @staticmethod
    def forward(ctx, x):
        ctx.hidden = torch.zeros(2**18)
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy


def test_live_bytes_see_what_hooks_do_not():
    x = torch.zeros(1, requires_grad=True)
    assert 2**20 <= measure.live_bytes(lambda: Hoarder.apply(x)) < 2**20 + 4096
    assert measure.saved_bytes(lambda: Hoarder.apply(x)) == 0

    def freed():
        big = torch.zeros(2**18)
        return big[:1].clone()

    assert measure.live_bytes(freed) < 4096
    y = torch.zeros(2**18, requires_grad=True)
    assert measure.saved_bytes(lambda: (y * y, y * y)) == 2**20


def test_goals():
    assert at_most(1.2).test(1.2, None) and not at_most(1.2).test(1.21, None)
    assert at_least(5).test(5.0, None) and not at_least(5).test(4.9, None)
    assert near(1, 0.1).test(1.05, None) and not near(1, 0.1).test(1.2, None)
    assert faster(10).test(1.0, 10.0) and not faster(10).test(1.0, 9.0) and faster(10).test(1.0, None) is None
    assert AHEAD.test(1.0, 1.5) and not AHEAD.test(1.5, 1.0) and AHEAD.test(1.0, None) is None


def test_the_table_goes_between_the_marks_of_a_page(tmp_path):
    stat = {"median": 1.1, "low": 1.0, "high": 1.2, "samples": [1.0, 1.1, 1.2]}
    figure = {"unit": "×", "what": "", "reach": ["≤ 1.2"], "ours": stat, "upstream": stat, "met": True}
    refused = {"figures": {}, "unsupported": {}, "refused": "outputs differ: by a lot"}
    results = {
        "machine": report.machine(),
        "threads": 1,
        "libraries": {"ours": "1", "upstream": "0"},
        "rows": {"step": {"title": "A title", "cases": {"one": {"figures": {"step": figure}}, "two": refused}}},
    }
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nafter\n")
    assert report.into(page, results) and report.into(page, results)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("A title") == 1 and "1.10 (1.00–1.20)" in text and "outputs differ: by a lot" in text
    assert not report.into(tmp_path / "none.md", results)
