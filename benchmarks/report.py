"""The results as a table on screen, JSON, Markdown and a plot."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

MARKS = ("<!-- benchmarks -->", "<!-- /benchmarks -->")
VERDICT = {True: "yes", False: "no", None: "–"}


def machine() -> dict[str, Any]:
    import torch
    import transformers

    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M)
        cpu = model.group(1) if model else cpu
    return {
        "cpu": cpu or platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "load before": load(),
    }


def load() -> float | None:
    """How many processes want the machine's cores: a quiet machine says less than one."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def number(value: float, unit: str = "×") -> str:
    if value == int(value) and (unit != "×" or not value):
        return f"{int(value):,}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}" if abs(value) < 1 else f"{value:.2f}"


def shown(stat: dict[str, Any] | None, unit: str) -> str:
    """The median with its quartiles."""
    if stat is None:
        return "–"
    text = number(stat["median"], unit) + (f" {unit}" if unit not in ("×", "") else "")
    if len(stat["samples"]) > 1 and stat["low"] != stat["high"]:
        text += f" ({number(stat['low'], unit)}–{number(stat['high'], unit)})"
    return text


def lines(results: dict[str, Any], everything: bool = False) -> Iterator[list[str]]:
    """Row, case and figure, ours, upstream, upstream ÷ ours, reach, met. Figures without a goal are left out, unless
    they are a case's first."""
    for name, row in results["rows"].items():
        for case, found in row["cases"].items():
            if "refused" in found or "error" in found:
                text = found.get("refused") or found["error"].strip().splitlines()[-1]
                yield [row["title"], case, text, "", "", "", "no"]
                continue
            for k, (figure, entry) in enumerate(found["figures"].items()):
                if k and not entry["reach"] and not everything:
                    continue
                ours, theirs = entry.get("ours"), entry.get("upstream")
                factor = ""
                if (
                    ours
                    and theirs
                    and ours["median"] > 0
                    and theirs["median"] > 0
                    and entry["unit"] not in ("", "× faster")
                ):
                    factor = number(theirs["median"] / ours["median"])
                yield [
                    row["title"],
                    case if figure == name else f"{case}: {figure}",
                    shown(ours, entry["unit"]) if ours else found["unsupported"].get("ours", "–"),
                    shown(theirs, entry["unit"]) if theirs else found["unsupported"].get("upstream", "–"),
                    factor,
                    ", ".join(entry["reach"]),
                    VERDICT[entry.get("met")] if entry["reach"] else "",
                ]


def on_screen(results: dict[str, Any], console: Console) -> None:
    table = Table(title="Medians (quartiles)", row_styles=["", "dim"])
    for name in ("row", "figure", "ours", "upstream", "upstream ÷ ours", "reach", "met"):
        table.add_column(name)
    last = None
    for title, *cells in lines(results):
        colour = {"yes": "green", "no": "red"}.get(cells[-1], "")
        cells = [escape(c) for c in cells]
        cells[-1] = f"[{colour}]{cells[-1]}[/]" if colour else cells[-1]
        table.add_row(title if title != last else "", *cells)
        last = title
    console.print(table)


def markdown(results: dict[str, Any]) -> str:
    m = results["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in results["libraries"].items())
    head = [
        f"{m['cpu']}, {results['threads']} of {m['cores']} cores; {m['system']}, Python {m['python']}, torch {m['torch']}, "
        f"transformers {m['transformers']}; {versions}; {m['date']}. Medians with quartiles; ratios without unit.",
        "",
        "| | figure | ours | upstream | upstream ÷ ours | reach | met |",
        "|---|---|---|---|---|---|---|",
    ]
    last = None
    body = []
    for title, *cells in lines(results):
        body.append("| " + " | ".join([title if title != last else "", *(c.replace("|", "\\|") for c in cells)]) + " |")
        last = title
    return "\n".join([*head, *body]) + "\n"


def plot(results: dict[str, Any], file: Path) -> bool:
    """Upstream ÷ ours of every figure that has a goal and a value on both sides, on a log scale; False if none has."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names, values, colours = [], [], []
    for row in results["rows"].values():
        for case, found in row["cases"].items():
            for figure, entry in found["figures"].items():
                if entry["reach"] and "ours" in entry and "upstream" in entry and entry["unit"] != "× faster":
                    ours, theirs = entry["ours"]["median"], entry["upstream"]["median"]
                    if ours > 0 and theirs > 0:
                        names.append(f"{row['title']}, {case}: {figure}")
                        values.append(theirs / ours)
                        colours.append({True: "#2a7f62", False: "#b5533c", None: "#888888"}[entry.get("met")])
    if not names:
        return False
    figure_, axes = plt.subplots(figsize=(11, 0.9 + 0.28 * len(names)))
    axes.barh(range(len(names)), [v - 1 for v in values], left=1, color=colours)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    for k, v in enumerate(values):
        axes.annotate(
            f"{v:.2f}" if v < 10 else f"{v:.0f}", (max(v, 1), k), (3, -3), textcoords="offset points", fontsize=7
        )
    axes.set_xlabel("upstream ÷ ours (green: goal met)")
    axes.spines[["top", "right"]].set_visible(False)
    figure_.tight_layout()
    figure_.savefig(file, dpi=110)
    plt.close(figure_)
    return True


def write(results: dict[str, Any], file: Path) -> list[Path]:
    """JSON, and beside it the table and the plot."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    written = [file, file.with_suffix(".md")]
    try:
        if plot(results, file.with_suffix(".png")):
            written.append(file.with_suffix(".png"))
    except ImportError:
        pass
    return written


def into(page: Path, results: dict[str, Any]) -> bool:
    """Put the table between the marks of a page, if it has them."""
    if not page.exists():
        return False
    text = page.read_text(encoding="utf-8")
    if not all(mark in text for mark in MARKS):
        return False
    before, rest = text.split(MARKS[0], 1)
    _, after = rest.split(MARKS[1], 1)
    page.write_text(f"{before}{MARKS[0]}\n{markdown(results)}{MARKS[1]}{after}", encoding="utf-8")
    return True
