"""The app: what it loads before a command runs, and what it says where a package is missing."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import peft

HEAVY = ("torch", "transformers", "datasets", "numpy", "accelerate", "safetensors", "matplotlib")
HELP = f"""
import json, sys
from peft.cli import app
sys.argv = ["peft", *sys.argv[1:]]
try:
    app()
except SystemExit as end:
    assert not end.code, end.code
loaded = [m for m in {HEAVY!r} if m in sys.modules] + [m for m in sys.modules if m.startswith("peft.core")]
print(json.dumps(loaded))
"""


@pytest.mark.parametrize("arguments", ["--help", "train --help", "inspect --help", "methods --help"])
def test_help_loads_no_heavy_library(arguments: str) -> None:
    paths = os.pathsep.join([str(Path(peft.__file__).parents[1]), *(p for p in sys.path if p)])
    done = subprocess.run(
        [sys.executable, "-c", HELP, *arguments.split()],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Usage" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_without_typer_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft as package

    for name in [n for n in sys.modules if n.startswith("peft.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(package, "cli", None, raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match="pip install typer"):
        importlib.import_module("peft.cli").app()
