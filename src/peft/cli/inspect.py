"""`peft inspect`: what an adapter is, read off its files alone."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .. import recipes
from ..errors import UserError
from .console import command, console, escape, facts, heading, shape, size, table
from .predict import Adapter

if TYPE_CHECKING:
    from ..recipes.saved import Entry, Saved

HIDDEN = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "peft_version",
    "auto_mapping",
    "revision",
    "inference_mode",
}
FEW = 8  # names or numbers that a list is shown whole with


@command
def inspect(
    adapter: Adapter,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show each layer, not only each group of like ones.")
    ] = False,
) -> None:
    """Say what an adapter is: method, base, ranks, parameters, size and norms. Reads no model and asks no hub."""
    saved = recipes.saved.open_adapter(adapter)
    entries, file, header = recipes.saved.entries(saved.folder)
    written, base = (json.loads(header.get(name, "{}")) for name in ("peft_config", "peft_base"))
    config, total = saved.config, sum(e.count for e in entries)
    _, found = recipes.saved.look_up(str(config.get("peft_type"))) or (None, None)
    ranks = sorted({r for e in entries if (r := recipes.saved.rank(config, e.layer)) is not None})
    facts(
        [
            ("method", f"{config.get('peft_type')}: {found.summary if found else 'unknown to this version'}"),
            ("formula", found.formula if found else None),
            ("base model", config.get("base_model_name_or_path") or "not named"),
            ("trained on", f"{base['class']}, vocabulary {base['vocab_size']}" if base else None),
            ("task", config.get("task_type")),
            ("written by", f"peft {config['peft_version']}" if config.get("peft_version") else None),
            ("rank", ", ".join(map(str, ranks)) or None),
            ("layers", len({e.layer for e in entries})),
            ("parameters", f"{total:,} ({', '.join(sorted({e.dtype for e in entries}))})"),
            ("size", f"{size(file.stat().st_size)} weights, {size(recipes.record.folder_size(saved.folder))} in all"),
        ],
        str(saved.folder),
    )
    settings = differing(saved, found.config_class if found else None)
    if settings:
        facts(settings.items(), "Settings that are not the default")
    heading("Frobenius norm of each tensor" if layers else "Frobenius norms (--layers shows each layer)")
    console.print(norms(entries, layers))
    other = [k for k, v in written.items() if k not in HIDDEN and config.get(k, v) != v]
    if other:
        console.print(f"[yellow]adapter_config.json disagrees with the weights' header in {', '.join(other)}.[/]")
    broken = [f"{e.layer}.{e.name}" for e in entries if not e.finite]
    if broken:
        raise UserError(
            f"{len(broken)} tensors hold NaN or infinite values, first {broken[0]}: this adapter is damaged."
        )


def differing(saved: Saved, cls: type | None) -> dict[str, object]:
    """The settings that differ from the config class's defaults, as the job gave them where that is shorter."""
    fields = {f.name: f for f in dataclasses.fields(cls)} if cls is not None else {}
    defaults = {n: f.default_factory() if callable(f.default_factory) else f.default for n, f in fields.items()}
    given = saved.job.config if saved.job else {}
    return {
        name: brief(given[name] if isinstance(given.get(name), str) else value)
        for name, value in saved.config.items()
        if name not in HIDDEN and value not in (None, {}, []) and value != defaults.get(name)
    }


def brief(value: object) -> object:
    """A setting in a line: runs of numbers as ranges, of many names the first ones and how many there are."""
    if not isinstance(value, list):
        return value
    shown = ranges(value) if all(type(v) is int for v in value) else [str(v) for v in value]
    return ", ".join(shown) if len(shown) <= FEW else f"{', '.join(shown[:3])}, ... ({len(shown)} in all)"


def ranges(numbers: Sequence[int]) -> list[str]:
    """`[0, 1, 2, 3, 8]` as `["0-3", "8"]`, in their order."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda at: at[1] - at[0])]
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


def norms(entries: Sequence[Entry], every: bool) -> Table:
    """Norms by layer, or by group of layers that differ in their number only."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[Entry]] = {}
    for e in entries:
        layer = e.layer if every else re.sub(r"(?<=\.)\d+(?=\.|$)", "*", e.layer)
        groups.setdefault((layer, e.name, e.sizes), []).append(e)
    columns = ("norm",) if every else ("layers", "least", "mean", "most")
    grid = table("layer", "tensor", "shape", *columns, right=("layers", *columns), whole=("tensor", "shape"))
    for (layer, name, sizes), found in groups.items():
        values = [e.norm for e in found]
        shown = [values[0]] if every else [min(values), sum(values) / len(values), max(values)]
        numbers = [f"{v:.4g}" for v in shown]
        grid.add_row(
            escape(layer or "(model)"), escape(name), shape(sizes), *([] if every else [str(len(found))]), *numbers
        )
    return grid
