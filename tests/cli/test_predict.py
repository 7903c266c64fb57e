"""`peft predict` and `peft generate`: what they refuse before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft.cli.generate import generate
from peft.cli.predict import predict
from tests.helpers.small_models import causal


def test_it_takes_texts_or_rows_but_not_both(peft: Any) -> None:
    assert "either --text" in peft("predict", "run", code=2)
    assert "either --text" in peft("predict", "run", "--text", "a", "--data", "b.jsonl", code=2)
    assert "no folder" in peft("predict", "run", "--text", "a", code=2)
    assert predict.__doc__ is not None and generate.__doc__ is not None


def test_generate_needs_something_to_write_on(peft: Any) -> None:
    assert "--prompt" in peft("generate", "run", code=2)
    assert "of at least 0" in peft("generate", "run", "--prompt", "a", "--temperature", "-1", code=2)


@pytest.mark.parametrize("value", ["-1", "0"])
def test_counts_out_of_range_are_refused_before_anything_is_loaded(peft: Any, value: str) -> None:
    assert "--batch-size is" in peft("predict", "run", "--text", "a", "--batch-size", value, code=2)
    assert "--max-new-tokens is" in peft("generate", "run", "--prompt", "a", "--max-new-tokens", value, code=2)
    for bad in ("nan", "inf", "-1"):
        assert "--temperature is" in peft("generate", "run", "--prompt", "a", "--temperature", bad, code=2)


def test_rows_without_text_are_not_answered(peft: Any, home: Path) -> None:
    peft(*causal(home, output="run"), "--trainer", "max_steps=1")
    good = (home / "heldout.jsonl").read_text().splitlines()[:3]
    Path("rows.jsonl").write_text("\n".join([*good, json.dumps({"text": None, "label": "complaint"})]))
    assert "rows.jsonl, line 4: column 'text' is missing or null" in peft(
        "predict", "run", "--data", "rows.jsonl", code=2
    )
    said = peft("predict", "run", "--data", "rows.jsonl", "--skip-bad-rows", "--output", "out.jsonl")
    assert "1 of 4 rows" in said and "3 rows written" in said and "accuracy" in said
    Path("rows.jsonl").write_text('{"text": "the box", "label": null}\n{"text": "the driver", "label": ""}\n')
    assert "accuracy" not in peft("predict", "run", "--data", "rows.jsonl")
    Path("rows.jsonl").write_text('{"text": "the box", "label": "other"}\n')
    assert "none of: complaint, no complaint" in peft("predict", "run", "--data", "rows.jsonl", code=2)
    assert "'text' is empty" in peft("predict", "run", "--text", " ", code=2)
    Path("run/job.yaml").write_text(Path("run/job.yaml").read_text() + "\nseed: 1\n")
    assert "'seed' stands there twice" in peft("predict", "run", "--text", "a", code=2)
