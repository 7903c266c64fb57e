"""`peft predict`: labels (or answers) for rows, with an adapter."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import recipes
from ..errors import UserError
from .console import command, console, escape, quiet_libraries, table
from .report import Report

if TYPE_CHECKING:
    from ..recipes.tasks.base import Answer

Adapter = Annotated[str, typer.Argument(help="The folder of a run, or of an adapter.", show_default=False)]
Base = Annotated[str | None, typer.Option("--model", "-m", help="The base, if not the one that the adapter names.")]
Dtype = Annotated[str, typer.Option(help="Of the base: auto, float32, bfloat16, float16.")]
SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave out rows without text, with unknown labels and the like.")
]
Template = Annotated[str | None, typer.Option(help="The prompt, with columns in braces, if not the run's own.")]


@command
def predict(
    adapter: Adapter,
    texts: Annotated[list[str] | None, typer.Option("--text", "-t", help="A text to label; repeat for more.")] = None,
    data: Annotated[str | None, typer.Option(help="Rows to label: JSONL, CSV, Parquet, or a data set's name.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the rows with their predictions as JSONL.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file if it exists.")] = False,
    model: Base = None,
    dtype: Dtype = "auto",
    template: Template = None,
    choice: Annotated[list[str] | None, typer.Option(help="A possible answer, if not the run's own; repeat.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 16,
    skip_bad_rows: SkipBadRows = False,
) -> None:
    """Label texts or rows. Where rows have the target column, the score is printed too."""
    import datasets

    quiet_libraries()
    if bool(texts) == bool(data):
        raise UserError("Give either --text (repeat it for more) or --data.")
    recipes.checks.number("--batch-size", batch_size, 1)
    recipes.checks.check_choices(choice or None)
    if output is not None:
        check_output(output, overwrite)
    saved = recipes.saved.open_adapter(adapter)
    given = {"template": template, "choices": choice or None}
    with Report() as report:
        loaded = recipes.saved.load(saved, model=model, dtype=dtype, data=given, on_event=report)
        task = loaded.task
        known = dataclasses.replace(task.data, skip_bad_rows=skip_bad_rows, choices=task.labels)
        if data:
            rows = recipes.data.read(data, known, task, target=False, on_event=report)
        else:
            asked = [{task.data.text: text, "text": text} for text in texts or []]
            rows = datasets.Dataset.from_list(asked)
            for row in asked:
                wrong = task.fault(known, row, task.labels, target=False)
                if wrong:
                    raise UserError(f"--text {row['text']!r:.60}: {wrong}.")
        found = task.predict(loaded.model, rows, batch_size)
        if data and task.data.target in rows.column_names and rows[task.data.target][0] not in (None, ""):
            scores = task.evaluate(loaded.model, rows, batch_size)
            console.print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in scores.items()))
    if output is not None:
        lines = (json.dumps({**row, **answer}, ensure_ascii=False, default=str) for row, answer in zip(rows, found))
        if is_stream(output):
            output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        else:
            with recipes.writing.aside(output) as part, part.open("w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
                check_output(output, overwrite)  # nobody has made it in the meantime
        console.print(f"{len(found)} rows written to {output}")
    else:
        _show([task.shown(row) for row in rows], found)


def is_stream(output: Path) -> bool:
    """A terminal, a pipe or the like, which is written into and never replaced."""
    special = output.exists() and not output.is_symlink() and not output.is_file() and not output.is_dir()
    return special or output.absolute().parent == Path("/dev")  # where even the standard output is a link


def check_output(output: Path, overwrite: bool) -> None:
    """The file may be written: nothing is lost by it but what the caller gives up."""
    if is_stream(output):
        return
    if output.is_symlink():
        raise UserError(f"{output} is a link to {os.path.realpath(output)}. Name the file itself.")
    if output.is_dir():
        raise UserError(f"{output} is a folder. Name a file to write the rows to.")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists already. Name another file, or give --overwrite to replace it.")
    above = next(p for p in output.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{output} cannot be written: {above} is no folder that you may write to.")


def _show(texts: Sequence[object], found: Sequence[Answer]) -> None:
    grid = table("prediction", "probability", "text", right=("probability",))
    for text, answer in zip(texts, found):
        said = answer["prediction"]
        shown = " ".join(f"{w}/{p}" for w, p in zip(answer["words"], said)) if "words" in answer else str(said)
        grid.add_row(f"[green]{escape(shown)}[/]", str(answer.get("probability", "")), escape(str(text)))
    console.print(grid)
