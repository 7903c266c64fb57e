"""Tiny models with a tokenizer of their own, rows to train on, and a runner of commands: fixtures of cli/ and recipes/."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from peft.cli import console as shared
from peft.cli.main import app

GOOD = "lovely quick friendly helpful warm clean fresh bright calm kind".split()
BAD = "late broken rude cold dirty lost slow noisy wet wrong".split()
FILLER = "the parcel was driver and box a very shop staff today my order is so".split()
TEMPLATE = "Tweet text : {text} Label : "


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models with a tokenizer of their own, and two files of rows."""
    root = tmp_path_factory.mktemp("small")
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
