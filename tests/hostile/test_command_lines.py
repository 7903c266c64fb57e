"""Hostile command lines: mutated job files, data files and flags. Each ends well, or in one message and no traceback."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from peft.cli import console as shared
from peft.cli.main import app
from tests.helpers.small_models import TEMPLATE, home
from tests.hostile import examples, seed

__all__ = ["home"]

VALUES = [
    "null", "-1", "0", "1", "1e999", ".nan", "-.inf", "true", "'false'", "abc", "''", "[]", "[null]", "[a]", "{}",
    "{a: 1}", "2001-01-01", "2001-99-99", "!!python/name:os.system", "!!binary aGk=", "&a [*a]", "*x", "'\\0'", "\"\\0\"",
    "9" * 30, "9" * 5000, "'" + "x" * 5000 + "'", "{x.__class__}", "'{text.__class__}'", "'{text:>999999999}'", "'{'",
    "'{0}'", "'{text!r}'", "[a, a]", "/", ".", "'../..'", "'\\ud800'", "\"\\ud800\"", "1:30", "0x10", "yes",
]  # fmt: skip
KEYS = [
    "model", "task", "method", "config", "data", "trainer", "output", "dtype", "seed", "show", "evaluate_before",
    "checkpoint_minutes", "data.train", "data.eval", "data.subset", "data.text", "data.target", "data.template",
    "data.choices", "data.max_length", "data.limit", "data.skip_bad_rows", "config.r", "config.lora_alpha",
    "config.target_modules", "config.layers_to_transform", "trainer.learning_rate", "trainer.max_steps",
    "trainer.num_train_epochs", "trainer.per_device_train_batch_size", "trainer.warmup_steps", "lr", "epochs", "data.lr",
]  # fmt: skip
CELLS: list[Any] = [
    None,
    "",
    " ",
    5,
    -1.5,
    float("nan"),
    float("inf"),
    True,
    [],
    ["a"],
    {},
    "x" * 9999,
    "\ud800",
    "\0",
    10**40,
]
BYTES = [
    b"\0",
    b"\xff",
    b"\xfe\xff",
    b"\x1f\x8b",
    b"{",
    b"}",
    b'"',
    b"\n",
    b",",
    b"\xef\xbb\xbf",
    b"[" * 3000,
    b"-",
    b":",
]


@pytest.fixture
def run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shared.errors, "width", 200)

    def run(*arguments: Any) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        said = f"{arguments}\n{result.output}"
        assert result.exit_code in (0, 2) and "Traceback" not in result.output, f"{said}\n{result.exception!r}"
        assert result.exception is None or isinstance(result.exception, SystemExit), f"{said}\n{result.exception!r}"
        if result.exit_code:
            assert result.output.count("Error") >= 1 and len(result.output) < 25_000, said
            assert "object has no attribute" not in result.output and "unexpected keyword" not in result.output, said
        return result.exit_code, result.output

    return run


def good(home: Path) -> dict[str, str]:
    return {
        "model": str(home / "llama"), "method": "lora", "output": "run", "config.r": "2", "data.train": "rows.jsonl",
        "data.template": f'"{TEMPLATE}"', "data.choices": "[complaint, no complaint]", "trainer.max_steps": "1",
    }  # fmt: skip


def written(fields: dict[str, str]) -> str:
    top = [f"{k}: {v}" for k, v in fields.items() if "." not in k]
    for part in ("data", "config", "trainer"):
        inner = [f"  {k.partition('.')[2]}: {v}" for k, v in fields.items() if k.startswith(f"{part}.")]
        top += [f"{part}:", *inner] if inner and part not in fields else []
    return "\n".join(top)


def rows(home: Path) -> list[dict[str, Any]]:
    return [
        {"text": r["text"], "label": r["label"]}
        for r in map(json.loads, (home / "train.jsonl").read_text().splitlines()[:6])
    ]


def mutated(rng: random.Random, content: bytes) -> bytes:
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content) + 1)
        content = rng.choice(
            [
                content[:at],
                content[:at] + rng.choice(BYTES) + content[at:],
                content[:at] + content[at + rng.randint(1, 9) :],
            ]
        )
    return content


def test_job_files(home: Path, run: Any) -> None:
    rng = random.Random(seed(1))
    Path("rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(home)))
    assert run("train", "--dry-run", *_file(written(good(home)).encode()))[0] == 0
    for _ in range(examples(30)):
        fields = good(home)
        for _ in range(rng.randint(1, 2)):
            fields[rng.choice(KEYS)] = rng.choice(VALUES)
        content = written(fields).encode()
        if rng.random() < 0.3:
            content = mutated(rng, content)
        run("train", "--dry-run", *_file(content))
        assert not Path("run").exists()


def _file(content: bytes) -> list[str]:
    Path("job.yaml").write_bytes(content)
    return ["job.yaml"]


def test_data_files(home: Path, run: Any) -> None:
    rng = random.Random(seed(2))
    job = _file(written(good(home) | {"data.train": "none"}).encode())
    for _ in range(examples(30)):
        suffix, given = rng.choice(["jsonl", "json", "csv", "tsv", "parquet"]), rows(home)
        sure = False
        if suffix in ("jsonl", "json") and rng.random() < 0.6:
            given[rng.randrange(len(given))][rng.choice(["text", "label"])] = rng.choice(
                [c for c in CELLS if c not in ("x" * 9999, "\0")]
            )
            sure = True
        if suffix == "jsonl":
            content = "".join(json.dumps(r) + "\n" for r in given).encode()
        elif suffix in ("json", "parquet"):
            content = json.dumps(given).encode()
        else:
            tab = "," if suffix == "csv" else "\t"
            content = "\n".join([f"text{tab}label", *(f"{r['text']}{tab}{r['label']}" for r in given)]).encode()
        if not sure:
            content = mutated(rng, content)
        file = f"rows.{suffix}"
        Path(file).write_bytes(content)
        code, said = run("train", *job, "--train", file, "--dry-run")
        if sure:
            assert code == 2 and f"{file}, line " in said, said
            code, said = run("train", *job, "--train", file, "--dry-run", "--skip-bad-rows")
            assert "1 of 6 rows" in said or code == 2, said
        run("train", *job, "--train", file, "--dry-run", "--skip-bad-rows")


def test_flags(home: Path, run: Any) -> None:
    rng = random.Random(seed(3))
    Path("rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(home)))
    job = _file(written(good(home)).encode())
    flags = [
        "--model", "--task", "--train", "--eval", "--text", "--target", "--template", "--choice", "--max-length",
        "--method", "--set", "--trainer", "--dtype", "--seed", "--stop-after", "--lr", "--epochs", "--batch-size",
    ]  # fmt: skip
    for _ in range(examples(25)):
        flag, value = rng.choice(flags), rng.choice(VALUES)
        if flag in ("--set", "--trainer"):
            value = f"{rng.choice(['r', 'learning_rate', 'max_steps', 'lora_alpha', 'nothing', ''])}={value}"
        run("train", *job, "--dry-run", f"{flag}={value}")
    for flag, said in {"--lr": "learning_rate", "--epochs": "num_train_epochs", "--data": "--train"}.items():
        code, output = run("train", *job, "--dry-run", flag, "1")
        assert code == 2 and said in output
