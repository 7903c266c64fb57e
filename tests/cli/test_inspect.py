"""`peft inspect`: what an adapter is, and damage that is named."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from peft import LoraConfig
from peft.cli.inspect import FEW, brief, differing, norms, ranges
from peft.recipes import saved
from peft.recipes.job import Job
from peft.recipes.saved import Saved
from tests.helpers.small_models import causal


def test_damaged_adapters_are_named(peft: Any, home: Path) -> None:
    assert "no folder" in peft("inspect", "nowhere", code=2)
    Path("empty").mkdir()
    assert "adapter_config.json" in peft("inspect", "empty", code=2)
    peft(*causal(home, output="run"), "--trainer", "max_steps=1")
    weights = Path("run/adapter/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged" in peft("inspect", "run", code=2)
    peft("predict", "run", "--text", "the box", code=2)


def test_runs_of_numbers_are_shown_as_ranges() -> None:
    assert ranges([0, 1, 2, 3, 8]) == ["0-3", "8"] and ranges([3, 2, 4, 5]) == ["3", "2", "4-5"] and ranges([]) == []
    assert brief(list(range(15, 30))) == "15-29"


@pytest.mark.parametrize(("count", "end"), [(FEW, f"p{FEW - 1}"), (105, "p0, p1, p2, ... (105 in all)")])
def test_many_names_are_shown_by_the_first_ones_and_their_count(count: int, end: str) -> None:
    shown = brief([f"p{i}" for i in range(count)])
    assert shown.endswith(end) and len(shown) < 60


def test_settings_are_shown_as_the_job_gave_them(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=[f"p{i}" for i in range(20)], layers_to_transform=[1, 2, 3]).to_dict()
    job = Job(config={"r": 4, "target_modules": "all-linear", "layers_to_transform": "1-3"})
    shown = differing(Saved(tmp_path, config, job), LoraConfig)
    assert shown == {"r": 4, "target_modules": "all-linear", "layers_to_transform": "1-3"}
    alone = differing(Saved(tmp_path, config, None), LoraConfig)
    assert alone["layers_to_transform"] == "1-3" and alone["target_modules"].endswith("(20 in all)")


def test_norms_are_readable_at_80_columns() -> None:
    layer = "model.language_model.layers.3.block_sparse_mixture.experts.gate_and_up_projection"
    entries = [saved.Entry(layer, "lora_magnitude_vector", (16, 14336), "float32", 1, 2.345e-10, True)]
    for every in (False, True):
        console = Console(width=80, file=io.StringIO())
        console.print(norms(entries, every))
        said = console.file.getvalue()
        assert "lora_magnitude_vector" in said and "16×14336" in said and "2.345e-10" in said
        assert all(len(line) <= 80 for line in said.splitlines())
