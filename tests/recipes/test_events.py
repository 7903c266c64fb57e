"""Events: small values that a listener gets in order, from a library that prints nothing."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import peft
from peft.recipes import events

RECIPES = Path(peft.__file__).parent / "recipes"


def test_items_come_with_their_progress() -> None:
    told: list[events.Event] = []
    assert list(events.track("ab", "reading", told.append)) == ["a", "b"]
    assert told == [events.Progress("reading", n, 2) for n in (0, 1, 2)]
    told.clear()
    assert list(events.track([], "reading", told.append)) == [] and told == [events.Progress("reading", 0, 0)]


def test_work_ends_by_success_or_by_an_error() -> None:
    told: list[events.Event] = []
    with events.working("loading", told.append):
        assert told == [events.Began("loading")]
    with pytest.raises(ValueError, match="bad"), events.working("more", told.append):
        raise ValueError("bad")
    assert told[1:] == [events.Ended("loading"), events.Began("more"), events.Ended("more")]


def test_events_are_frozen_values_and_the_union_names_them_all() -> None:
    made = {c for c in vars(events).values() if dataclasses.is_dataclass(c)} - {events.Target}
    assert made == set(get_args(events.Event))
    assert all(c.__dataclass_params__.frozen and c.__doc__ for c in made)
    assert events.ignore(events.StopAsked()) is None


def test_a_plan_adds_up_its_targets() -> None:
    targets = (events.Target("a", "linear", (2, 3), 10), events.Target("b", "linear", None, 7))
    assert events.Plan("lora", "m", "causal_lm", targets, 100, 3).added == 17


def test_recipes_neither_print_nor_know_a_face() -> None:
    found = []
    for path in sorted(RECIPES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += [f"{path.name}: {a.name}" for a in node.names if a.name.split(".")[0] in ("typer", "rich")]
            elif isinstance(node, ast.ImportFrom):
                from_face = (node.module or "").split(".")[0] in ("typer", "rich", "cli")
                found += [f"{path.name}: {node.module}"] if from_face else []
            elif isinstance(node, ast.Name) and node.id == "print":
                found.append(f"{path.name}:{node.lineno} prints")
    assert not found


def test_the_package_and_its_events_are_light() -> None:
    code = "import sys; from peft import recipes; from peft.recipes import events; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr[-2000:]


def test_parts_are_imported_when_asked_for() -> None:
    from peft import recipes

    for name in recipes.PARTS:
        assert getattr(recipes, name).__name__ == f"peft.recipes.{name}"
    here = {p.stem for p in RECIPES.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert set(recipes.PARTS) == here - {"__init__", "__pycache__"}
    with pytest.raises(AttributeError, match="nothing"):
        _ = recipes.nothing
