"""The quick check runs what a change touches: tests/changed.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import changed

LORA = "([LORA[ and ]-linear[)"


def chosen(*files: str, root: Path = changed.ROOT) -> tuple[list[str], list[str]]:
    """(expressions for cells, test files) for changes of these files, without what is always there."""
    *flags, which, rules, laws = changed.arguments(files, root)[:7]
    assert (*flags, rules, laws) == ("-q", "-m", "not slow", "-k", changed.RULES, changed.LAWS)
    first, *more, rest = which.split(" or ")
    assert first == LORA and rest == f"not {Path(laws).name}"
    return more, changed.arguments(files, root)[7:]


@pytest.mark.slow
def test_pytest_takes_these_cells_and_all_tests_of_the_other_files():
    wanted = changed.arguments(["src/peft/methods/hra.py", "src/peft/layers/embedding.py"])
    command = [sys.executable, "-m", "pytest", "--collect-only", *wanted]
    done = subprocess.run(command, cwd=changed.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    laws = [line for line in done.stdout.splitlines() if line.startswith(changed.LAWS)]
    cells = {m.groups() for line in laws if (m := re.search(r"\[(\w+)\[.*\]-(\w+)\[", line))}
    kinds = {("LORA", kind) for kind in ("linear", "embedding", "embedding_max_norm", "own_embedding")}  # built on it
    assert cells == {*kinds, ("HRA", "linear")} and len(laws) > 50
    assert f"{changed.RULES}::test_imports_go_down_the_stair" in done.stdout


def test_nothing_changed_and_nothing_that_python_runs():
    assert chosen() == ([], [])
    assert chosen("README.md", "docs/design.md", "pyproject.toml", "tests/golden/prompt/make.py") == ([], [])


@pytest.mark.parametrize(
    "file, expected",
    [
        ("methods/oft.py", {"([OFT[ and ]-linear[)"}),
        ("methods/phm.py", {"([PHM[ and ]-linear[)", "([COMPACTER[ and ]-linear[)"}),  # one is built on the other
        ("variants/dora.py", {"(use_dora and ]-linear[)"}),
        ("companions/modules_to_save.py", {"(modules_to_save and ]-linear[)"}),
        ("layers/embedding.py", {"([LORA[ and ]-embedding[)"}),
        ("layers/conv.py", {f"([LORA[ and ]-conv{n}d[)" for n in (1, 2, 3)}),
        ("core/files/keys.py", set()),
    ],
)
def test_a_source_file_brings_its_cells(file, expected):
    found, _ = chosen(f"src/peft/{file}")
    assert expected <= set(found) and bool(found) == bool(expected)


def test_files_bring_their_tests_once(tmp_path):
    for name in (
        "core/files/test_keys.py",
        "core/load/test_combine.py",
        "methods/test_oft.py",
        "test_auto.py",
        "test_api.py",
    ):
        (tmp_path / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / name).touch()
    sources = ("core/files/keys", "core/load/combine", "core/load/load", "methods/oft", "auto")
    files = [*(f"src/peft/{s}.py" for s in sources), "tests/methods/test_oft.py", "tests/test_api.py", "tests/cells.py"]
    assert chosen(*files, root=tmp_path)[1] == [
        "tests/core/files/test_keys.py",
        "tests/core/load/test_combine.py",
        "tests/methods/test_oft.py",
        "tests/test_auto.py",
        "tests/test_api.py",
    ]


def test_what_changed_is_asked_of_git(tmp_path):
    def git(*args: str) -> None:
        who = ("-c", "user.name=t", "-c", "user.email=t@localhost")
        subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True)

    def write(*names: str) -> None:
        for name in names:
            (tmp_path / name).write_text(name, encoding="utf-8")

    assert changed.changed(tmp_path) == []  # no repository
    git("init", "-b", "trunk")
    write("old.py", "gone.py", "same.py", ".gitignore")
    git("add", ".")
    git("commit", "-m", "first")
    write("new.py")
    assert changed.changed(tmp_path) == []  # no main
    git("branch", "main")
    (tmp_path / ".gitignore").write_text("ignored.py", encoding="utf-8")
    (tmp_path / "old.py").write_text("changed", encoding="utf-8")
    (tmp_path / "gone.py").unlink()
    git("commit", "-am", "second")
    write("ignored.py", "two words.py")
    assert changed.changed(tmp_path) == [".gitignore", "new.py", "old.py", "two words.py"]
