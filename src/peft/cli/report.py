"""What a run tells: the plan before training, the three counts, the loss plot, the metrics file."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .console import console, escape, heading, shape, table


def plan(rows: Iterable[Any], *, every: bool = False, title: str = "What will be adapted") -> int:
    """Prints the dry run, layers that differ only in their number as one line, and returns the parameters it adds."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        sizes = tuple(row.shape) if row.shape is not None else None
        path = row.path if every else re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.path)
        groups.setdefault((path, row.kind, sizes, row.parameters), []).append(row)
    heading(title)
    grid = table("where", "kind", "shape", "layers", "parameters", right=("layers", "parameters"))
    total = layers = 0
    for (path, kind, sizes, each), found in groups.items():
        total, layers = total + each * len(found), layers + len(found)
        grid.add_row(
            escape(path or "(the whole model)"),
            str(getattr(kind, "name", kind) or ""),
            shape(sizes),
            str(len(found)),
            f"{each * len(found):,}",
        )
    grid.add_section()
    grid.add_row("total", "", "", str(layers), f"{total:,}")
    console.print(grid)
    return total


def counts(found: Any) -> dict[str, Any]:
    """The three ways of counting, kept apart: trainable, updated base parameters, rank of the update."""
    ranks: dict[str, int] = {}
    for rank in found.ranks.values():
        ranks[str(rank)] = ranks.get(str(rank), 0) + 1
    return {
        "trainable": found.trainable,
        "total": found.total,
        "trainable_percent": 100 * found.trainable / max(1, found.total),
        "updated": found.updated,
        "updated_percent": 100 * found.updated / max(1, found.total - found.trainable),
        "rank": found.rank,
        "layers_by_rank": ranks,
    }


def count_facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    rank = "no single rank" if found["rank"] is None else f"at most {found['rank']}"
    layers = sum(found["layers_by_rank"].values())
    return [
        ("trainable parameters", f"{found['trainable']:,} of {found['total']:,} ({found['trainable_percent']:.4f} %)"),
        ("updated base parameters", f"{found['updated']:,} ({found['updated_percent']:.2f} % of the base)"),
        ("rank of the update", f"{rank}{f', {layers} weights' if layers else ''}"),
    ]


def scores(before: dict[str, float] | None, after: dict[str, float] | None) -> list[tuple[str, str]]:
    """Each held-out score as `before → after`."""
    names = [n for n in (after or before or {}) if n not in ("rows", "tokens", "seconds")]
    rows = []
    for name in names:
        values = [part[name] for part in (before, after) if part and name in part]
        rows.append((f"held-out {name.replace('_', ' ')}", " → ".join(f"{v:.4f}" for v in values)))
    return rows


def plot(history: list[dict[str, float]], path: Path, title: str) -> bool:
    """The loss over the steps as a PNG; False where matplotlib is missing or nothing was logged."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        console.print("No loss plot: matplotlib is not installed (pip install matplotlib).")
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    drawn = False
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(row["step"], row[key]) for row in history if key in row]
        if points:
            axes.plot(*zip(*points), marker="o", markersize=3, label=label)
            drawn = True
    if drawn:
        axes.set(xlabel="step", ylabel="loss", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=120)
    return drawn


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("peft", "torch", "transformers", "datasets", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def write(path: Path, content: dict[str, Any]) -> None:
    """JSON, written aside and renamed, so that a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(aside, path)
