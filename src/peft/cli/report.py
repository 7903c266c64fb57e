"""What a run looks like: its events as lines, tables and bars."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..recipes import events
from .console import console, escape, facts, heading, shape, size, table
from .progress import Bar


class Report:
    """The listener of a command: prints every event. A context: what is left of a bar is taken away at its end."""

    def __init__(self, *, every: bool = False) -> None:
        self.every, self.bar = every, Bar(console)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, event: events.Event) -> None:
        match event:
            case events.Began(title):
                self.bar.spin(title)
            case events.Progress(title, done, total) if done < total:
                self.bar.move(title, done, total)
            case events.Step(step, steps):
                self.bar.move("training", step, steps, lines=False)
            case events.Ended() | events.Progress() | events.TrainingEnded():
                self.bar.close()
            case events.Plan():
                plan(event, every=self.every)
            case events.Finished():
                facts(outcome(event), "Done")
            case events.Answered(rows):
                answered(rows)
            case _:
                for line in lines(event):
                    console.print(line)


def lines(event: events.Event) -> list[str]:
    """The events that take a line of text."""
    match event:
        case events.RowsRead(train, held_out):
            return [f"{train} rows to train on, {'none' if held_out is None else held_out} held out"]
        case events.Skipped(name, count, rows, first):
            said = [f"[yellow]{count} of {rows} rows in {escape(name)} are left out:[/]"]
            said += [escape(f"  {place}: {wrong}") for place, wrong in first]
            return said + ([f"  ... and {count - len(first)} more"] if count > len(first) else [])
        case events.Adopted(folder):
            return [
                f"{escape(str(folder))} was written by an earlier version, which kept no list of its files: they stay, also "
                "those that are used up."
            ]
        case events.Shared(processes, rows, accumulated):
            times = f" × {accumulated} accumulated" if accumulated > 1 else ""
            return [f"{processes} processes × {rows} rows{times} = {event.step} rows a step"]
        case events.GoingOn(step, steps):
            return [f"Going on from step {step} of {steps}."]
        case events.BaseScored(found):
            return ["  ".join(f"base {name} {value}" for name, value in scores(found, None))]
        case events.Logged():
            return logged(event)
        case events.StopAsked():
            return ["Stopping after this step; its state will be saved."]
        case events.Stopped(step, steps):
            return [f"Stopped after step {step} of {steps}. The same command goes on from there."]
        case events.NoPlot(package):
            return [f"No loss plot: {package} is not installed (pip install {package})."]
    return []


def logged(event: events.Logged) -> list[str]:
    """Step, losses, learning rate, memory and the time that is left; nothing where no loss was logged."""
    parts = [f"{name} {event.numbers[name]:.4f}" for name in ("loss", "eval_loss") if name in event.numbers]
    if not parts:
        return []
    if "learning_rate" in event.numbers:
        parts.append(f"lr {event.numbers['learning_rate']:.2e}")
    parts.append(f"memory {size(event.memory.get('accelerator_peak', event.memory['now']))}")
    return ["  ".join([f"step {event.step}/{event.steps}", *parts, f"{event.seconds_left:.0f} s left"])]


def plan(found: events.Plan, *, every: bool = False) -> None:
    """The table of what will be adapted; layers that differ only in their number as one line, unless `every`."""
    groups: dict[tuple[str, str, tuple[int, ...] | None, int], int] = {}
    for target in found.targets:
        path = target.path if every else re.sub(r"(?<=\.)\d+(?=\.|$)", "*", target.path)
        key = (path, target.kind, target.shape, target.parameters)
        groups[key] = groups.get(key, 0) + 1
    heading(f"What {found.method} adapts in {found.model} ({found.task})")
    grid = table("where", "kind", "shape", "layers", "parameters", right=("layers", "parameters"))
    for (path, kind, sizes, each), count in groups.items():
        grid.add_row(escape(path or "(the whole model)"), kind, shape(sizes), str(count), f"{each * count:,}")
    grid.add_section()
    grid.add_row("total", "", "", str(len(found.targets)), f"{found.added:,}")
    console.print(grid)
    for path, why in found.passed_over.items():
        console.print(escape(f"passed over: {path}: {why}"))


def dry_run(found: events.Plan, *, every: bool = False) -> None:
    """The plan, and how large it is beside the base."""
    plan(found, every=every)
    share = 100 * found.added / found.base_parameters
    console.print(
        f"{found.added:,} new parameters beside {found.base_parameters:,} of the base ({share:.4f} %), "
        f"{found.steps} steps"
    )


def outcome(found: events.Finished) -> list[tuple[str, object]]:
    """What a finished run achieved, as names and values."""
    metrics = found.metrics
    used = metrics["memory_bytes"]
    rows: list[tuple[str, object]] = [*counts(metrics["counts"])]
    rows += [("adapter", f"{found.adapter} ({size(metrics['adapter_bytes'])})")]
    rows += scores(metrics["before"], metrics["after"])
    rows += [("peak memory", size(used.get("accelerator_peak", used["peak"])))]
    rows += [("time", f"{metrics['seconds']['total'] / 60:.1f} min")]
    return [*rows, ("loss plot", found.plot), ("metrics", found.metrics_file)]


def counts(found: events.Counted) -> list[tuple[str, str]]:
    rank = "no single rank" if found["rank"] is None else f"at most {found['rank']}"
    layers = sum(found["layers_by_rank"].values())
    return [
        ("trainable parameters", f"{found['trainable']:,} of {found['total']:,} ({found['trainable_percent']:.4f} %)"),
        ("updated base parameters", f"{found['updated']:,} ({found['updated_percent']:.2f} % of the base)"),
        ("rank of the update", f"{rank}{f', {layers} weights' if layers else ''}"),
    ]


def scores(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> list[tuple[str, str]]:
    """Each held-out score as `before → after`."""
    names = [n for n in (after or before or {}) if n not in ("rows", "tokens", "seconds")]
    rows = []
    for name in names:
        values = [part[name] for part in (before, after) if part and name in part]
        rows.append((f"held-out {name.replace('_', ' ')}", " → ".join(f"{v:.4f}" for v in values)))
    return rows


def answered(rows: tuple[tuple[str, str], ...]) -> None:
    """Held-out rows with what the adapted model answers."""
    heading("Held-out rows, answered")
    for asked, answer in rows:
        console.print(f"{escape(asked.rstrip())} [green]{escape(answer)}[/]", soft_wrap=True)
