"""`peft predict` and `peft generate`: what they refuse before anything is loaded."""

from __future__ import annotations

from typing import Any

from peft.cli.generate import generate
from peft.cli.predict import predict


def test_it_takes_texts_or_rows_but_not_both(peft: Any) -> None:
    assert "either --text" in peft("predict", "run", code=2)
    assert "either --text" in peft("predict", "run", "--text", "a", "--data", "b.jsonl", code=2)
    assert "no folder" in peft("predict", "run", "--text", "a", code=2)
    assert predict.__doc__ is not None and generate.__doc__ is not None


def test_generate_needs_something_to_write_on(peft: Any) -> None:
    assert "--prompt" in peft("generate", "run", code=2)
    assert "of at least 0" in peft("generate", "run", "--prompt", "a", "--temperature", "-1", code=2)
