"""What the README and the documents print runs as it is printed, with a tiny model in the place of `path/or/hub-id`."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(file: Path) -> Iterator[tuple[str, str]]:
    """Every fenced block as (language, text), and every indented line as ("", text)."""
    text = file.read_text(encoding="utf-8")
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        yield language, body
    for body in re.findall(r"^    (\S.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M):
        yield "", body


def lines() -> list[tuple[str, list[str]]]:
    found = []
    for file in DOCUMENTS:
        for language, body in blocks(file):
            if language in ("", "bash", "sh", "console"):
                for line in body.splitlines():
                    words = line.split()
                    if words and words[0] in ("peft", "make", "python", "pytest", "pip"):
                        found.append((file.name, shlex.split(line, comments=True)))
    return found


@pytest.fixture
def place(home: Path, tmp_path: Path) -> Path:
    shutil.copytree(home / "llama", tmp_path / "path" / "or" / "hub-id")
    shutil.copy(home / "train.jsonl", tmp_path / "messages.jsonl")
    return tmp_path


def test_the_commands_of_the_readme_run_one_after_another(place: Path, peft: Any) -> None:
    found = [words[1:] for name, words in lines() if name == "README.md" and words[0] == "peft"]
    assert [words[0] for words in found] == ["train", "generate", "inspect", "merge"]
    for words in found:
        assert peft(*words)
    assert (place / "runs/mine/adapter").is_dir() and (place / "merged/config.json").is_file()


def test_the_python_of_the_readme_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (code,) = [body for language, body in blocks(ROOT / "README.md") if language == "python"]
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert {p.name for p in Path("my-adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_other_commands_name_what_is_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for name, (command, *words) in lines():
        if command == "make":
            assert words[0] in targets, (name, words)
        elif command == "python" and words[0] == "-m":
            assert importlib.util.find_spec(words[1]) is not None, (name, words)
        elif command == "pytest":
            assert (ROOT / words[0]).exists(), (name, words)


def test_commands_within_the_text_have_flags_that_exist(peft: Any) -> None:
    for file in [*DOCUMENTS, ROOT / "examples/complaints/README.md", ROOT / "examples/complaints/demo.yaml"]:
        for said in re.findall(r"`(peft [a-z]+[^`]*)`", file.read_text(encoding="utf-8")):
            words = shlex.split(said)[1:]
            helped = peft(words[0], "--help")
            for flag in [w.partition("=")[0] for w in words if w.startswith("--")]:
                assert flag in helped, (file.name, said)
            for path in [w for w in words if w.startswith("examples/")]:
                assert (ROOT / path).exists(), (file.name, said)
