"""`peft inspect`: what an adapter is, read off its files alone."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import UserError, command, console, escape, facts, folder_size, heading, shape, size, table
from .predict import Adapter

ROOTS = ("base_model.model.", "base_model.")  # what adapter keys begin with
HIDDEN = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "peft_version",
    "auto_mapping",
    "revision",
    "inference_mode",
}


@dataclass
class Entry:
    """One tensor of an adapter file."""

    layer: str
    name: str
    sizes: tuple[int, ...]
    dtype: str
    count: int
    norm: float
    finite: bool


@command
def inspect(
    adapter: Adapter,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show each layer, not only each group of like ones.")
    ] = False,
) -> None:
    """Say what an adapter is: method, base, ranks, parameters, size and norms. Reads no model and asks no hub."""
    from . import adapters

    saved = adapters.open_adapter(adapter)
    entries, file, header = read(saved.folder)
    written, base = (json.loads(header.get(name, "{}")) for name in ("peft_config", "peft_base"))
    config, total = saved.config, sum(e.count for e in entries)
    known = {adapters.plain(n): m for n, m in adapters.registry.methods().items()}
    found = known.get(adapters.plain(str(config.get("peft_type"))))
    ranks = sorted({r for e in entries if (r := rank(config, e.layer)) is not None})
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
            ("size", f"{size(file.stat().st_size)} weights, {size(folder_size(saved.folder))} in all"),
        ],
        str(saved.folder),
    )
    settings = differing(config, found.config_class if found else None)
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


def read(folder: Path) -> tuple[list[Entry], Path, dict[str, str]]:
    """Every tensor of the adapter in a folder, one in memory at a time; the weights file, and its header's own words."""
    import torch
    from safetensors import SafetensorError, safe_open

    safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if safe.is_file():
        try:
            with safe_open(str(safe), framework="pt") as file:
                found = [entry(key, file.get_tensor(key)) for key in file.keys()]  # noqa: SIM118 - no dict
                return found, safe, file.metadata() or {}
        except SafetensorError as error:
            raise UserError(
                f"{safe} cannot be read ({error}): it is damaged or cut short. Fetch or save it again."
            ) from None
    if pickled.is_file():
        state = torch.load(pickled, map_location="cpu", weights_only=True)
        return [entry(key, tensor) for key, tensor in state.items()], pickled, {}
    raise UserError(f"{folder} has no weights: expected adapter_model.safetensors (or adapter_model.bin).")


def entry(key: str, tensor: Any) -> Entry:
    import torch

    root = next((r for r in ROOTS if key.startswith(r)), "")
    parts = key[len(root) :].split(".")
    last = len(parts) - 1
    while last > 0 and (parts[last] in ("weight", "bias") or parts[last].isdigit()):
        last -= 1
    values = tensor.double() if tensor.is_floating_point() else tensor.to(torch.float64)
    return Entry(
        layer=".".join(parts[:last]),
        name=".".join(p for p in parts[last:] if p != "weight"),
        sizes=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        count=tensor.numel(),
        norm=values.norm().item(),
        finite=bool(torch.isfinite(values).all()),
    )


def rank(config: dict[str, Any], layer: str) -> int | None:
    """The rank that the config gives a layer: the first of `rank_pattern` that fits its end, else `r`."""
    for pattern, value in (config.get("rank_pattern") or {}).items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", layer):
            return value if isinstance(value, int) else sum(value)
    r = config.get("r")
    return r if isinstance(r, int) else None


def differing(config: dict[str, Any], cls: type | None) -> dict[str, Any]:
    """The settings that differ from the config class's defaults."""
    fields = cls.__dataclass_fields__ if cls is not None else {}  # type: ignore[attr-defined]
    defaults = {n: f.default_factory() if callable(f.default_factory) else f.default for n, f in fields.items()}
    shown = {k: v for k, v in config.items() if k not in HIDDEN and v != defaults.get(k)}
    return {
        k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in shown.items() if v not in (None, {}, [])
    }


def norms(entries: list[Entry], every: bool) -> Any:
    """Norms by layer, or by group of layers that differ in their number only."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[Entry]] = {}
    for e in entries:
        layer = e.layer if every else re.sub(r"(?<=\.)\d+(?=\.|$)", "*", e.layer)
        groups.setdefault((layer, e.name, e.sizes), []).append(e)
    columns = ("norm",) if every else ("layers", "least", "mean", "most")
    grid = table("layer", "tensor", "shape", *columns, right=("layers", *columns))
    for (layer, name, sizes), found in groups.items():
        values = [e.norm for e in found]
        shown = [values[0]] if every else [min(values), sum(values) / len(values), max(values)]
        numbers = [f"{v:.4g}" for v in shown]
        grid.add_row(
            escape(layer or "(model)"), escape(name), shape(sizes), *([] if every else [str(len(found))]), *numbers
        )
    return grid
