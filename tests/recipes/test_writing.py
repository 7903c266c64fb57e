"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from peft.recipes import writing


def test_a_file_beside_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.jsonl"
    with pytest.raises(OSError, match="full"), writing.aside(file) as part:
        part.write_text("half")
        raise OSError("full")
    assert not list(tmp_path.iterdir())
    (tmp_path / "rows.jsonl.part").write_text("mine")
    with writing.aside(tmp_path / "rows.jsonl") as part:
        part.write_text("whole")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"rows.jsonl.part": "mine", "rows.jsonl": "whole"}


def test_errors_of_the_system_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as error, writing.writing(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "full")
    assert error.value.filename == str(tmp_path / "x")
    with pytest.raises(OSError) as error, writing.writing(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "full", "y")
    assert error.value.filename == "y"


def test_a_digest_is_of_the_bytes(tmp_path: Path) -> None:
    content = b"x" * ((1 << 20) + 7)
    (tmp_path / "x").write_bytes(content)
    assert writing.digest(tmp_path / "x") == hashlib.sha256(content).hexdigest()
