"""What a run leaves beside the adapter: the three counts, the loss plot, the metrics file."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..core.report.counts import Counts
from .events import Counted, NoPlot, OnEvent, ignore


def counts(found: Counts) -> Counted:
    """The three ways of counting, kept apart: trainable, updated base parameters, rank of the update."""
    return {
        "trainable": found.trainable,
        "total": found.total,
        "trainable_percent": 100 * found.trainable / max(1, found.total),
        "updated": found.updated,
        "updated_percent": 100 * found.updated / max(1, found.total - found.trainable),
        "rank": found.rank,
        "layers_by_rank": dict(Counter(map(str, found.ranks.values()))),
    }


def plot(history: Sequence[Mapping[str, float]], path: Path, title: str, on_event: OnEvent = ignore) -> bool:
    """The loss over the steps as a PNG; False where matplotlib is missing or nothing was logged."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        on_event(NoPlot("matplotlib"))
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
        figure.savefig(path, dpi=120, format="png")
    return drawn


def versions() -> dict[str, str]:
    """Of Python and of the libraries that a run depends on."""
    found = {"python": platform.python_version()}
    for name in ("peft", "torch", "transformers", "datasets", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def as_json(content: Mapping[str, object]) -> str:
    """The text of a JSON file."""
    return json.dumps(content, indent=2, default=str) + "\n"


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder and below it."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
