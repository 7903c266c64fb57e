"""Rows from files of every format, and the rows that are held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft.cli import console as shared
from peft.errors import UserError
from peft.recipes import data, job


def test_files_of_every_format(home: Path, tmp_path: Path) -> None:
    import pandas

    frame = pandas.read_json(home / "heldout.jsonl", lines=True)[["text", "label"]]
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_json(tmp_path / "a.json", orient="records")
    for suffix in ("csv", "tsv", "parquet", "json"):
        assert list(data.rows(str(tmp_path / f"a.{suffix}"))["text"]) == list(frame["text"])
    (tmp_path / "bad.jsonl").write_text('{"text": ')
    with pytest.raises(shared.UserError, match=r"bad\.jsonl, line 1: not JSON"):
        data.rows(str(tmp_path / "bad.jsonl"))


def test_rows_are_held_out_by_a_file_a_fraction_or_not_at_all(home: Path) -> None:
    train, file = str(home / "train.jsonl"), str(home / "heldout.jsonl")
    sizes = {}
    for given in (None, False, "", 0.25, file):
        rows, held_out = data.load(job.Data(train=train, eval=given), seed=0)
        sizes[given] = (len(rows), len(held_out) if held_out is not None else None)
    assert sizes == {None: (42, None), False: (42, None), "": (42, None), 0.25: (31, 11), file: (42, 12)}
    for given in (0, 1, 1.5, -0.1, True):
        with pytest.raises(UserError, match="between 0 and 1"):
            data.load(job.Data(train=train, eval=given), seed=0)
    assert [len(part) for part in data.load(job.Data(train=train, eval=file, limit=5), seed=0)] == [5, 5]
