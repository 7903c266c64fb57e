"""Methods by name, configs from jobs, and adapters read off their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft import LoraConfig, registry
from peft.errors import UserError
from peft.recipes import saved
from peft.recipes.job import Job
from peft.recipes.tasks.text import CausalLM


def test_methods_are_found_however_they_are_written() -> None:
    for name, method in registry.methods().items():
        for written in (name, name.lower(), name.lower().replace("_", "-"), name.replace("_", "")):
            assert saved.method(written) == (name, method)
    assert saved.look_up("lorra") is None
    with pytest.raises(UserError, match="Did you mean lora"):
        saved.method("lorra")


def test_a_jobs_config_has_its_ranges_written_out_and_stays_as_it_was() -> None:
    job = Job(method="lora", config={"target_modules": "all-linear", "layers_to_transform": "1-3"})
    made = saved.config(job, CausalLM, steps=5)
    assert isinstance(made, LoraConfig) and made.layers_to_transform == [1, 2, 3] and made.task_type == "CAUSAL_LM"
    assert job.config == {"target_modules": "all-linear", "layers_to_transform": "1-3"}
    assert saved.config(Job(method="adalora", config={"tinit": 1}), CausalLM, steps=50).total_step == 50
    with pytest.raises(UserError, match="`method`"):
        saved.config(Job(config={"peft_type": "LORA"}), CausalLM, steps=5)


def test_ranks_follow_the_cores_reading_of_patterns() -> None:
    config = {"r": 8, "rank_pattern": {"q_proj": 2, r"layers\.1\..*": 3, "mlp.up": 5}}
    paths = {"layers.0.q_proj": 2, "layers.1.k_proj": 3, "layers.0.mlp.up": 5, "layers.0.k_proj": 8}
    assert {p: saved.rank(config, p) for p in paths} == paths
    assert saved.rank({"rank_pattern": None}, "x") is None
    assert saved.rank({"r": 8, "rank_pattern": {"experts.down": 2}}, "experts.down[3]") == 2


def test_entries_name_layer_and_tensor(tmp_path: Path) -> None:
    key = "base_model.model.layers.0.q_proj"
    state = {f"{key}.lora_A.weight": torch.ones(2, 3), f"{key}.lora_B.weight": torch.full((3, 2), float("nan"))}
    save_file(state, tmp_path / "adapter_model.safetensors", {"note": "x"})
    found, file, header = saved.entries(tmp_path)
    assert file.name == "adapter_model.safetensors" and header == {"note": "x"}
    a, b = sorted(found, key=lambda e: e.name)
    assert (a.layer, a.name, a.sizes, a.dtype, a.count) == ("layers.0.q_proj", "lora_A", (2, 3), "float32", 6)
    assert a.norm == pytest.approx(6**0.5) and a.finite and not b.finite
    file.rename(tmp_path / "x")
    with pytest.raises(UserError, match="no weights"):
        saved.entries(tmp_path)
    torch.save(state, tmp_path / "adapter_model.bin")
    assert [e.name for e in saved.entries(tmp_path)[0]] == ["lora_A", "lora_B"]


def test_folders_without_an_adapter_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        saved.open_adapter(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no adapter"):
        saved.open_adapter(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        saved.open_adapter(str(tmp_path))
