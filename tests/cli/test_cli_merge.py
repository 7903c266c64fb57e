"""`peft merge`: what it refuses, and that nothing is left of a merge that fails."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peft.cli.merge import TOLERANCE, merge, probe


def test_an_existing_folder_is_not_overwritten(peft: Any, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert "exists already" in peft("merge", "run", "there", code=2)
    assert "no folder" in peft("merge", "run", "new", code=2) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("two_parts", [True, False])
def test_the_probe_has_the_form_of_the_task(two_parts: bool) -> None:
    model = SimpleNamespace(device="cpu", config=SimpleNamespace(is_encoder_decoder=two_parts))
    task = SimpleNamespace(tokenizer=lambda text: SimpleNamespace(input_ids=list(range(12))))
    batch = probe(SimpleNamespace(model=model, task=task), "text")
    assert batch["input_ids"].shape == (1, 12) and bool(batch["attention_mask"].all())
    assert ("decoder_input_ids" in batch) == two_parts
    assert all(hasattr(torch, name) for name in TOLERANCE) and merge.__doc__ is not None
