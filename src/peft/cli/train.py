"""`peft train`: from a job to an adapter, a loss plot and a JSON of metrics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import recipes
from ..recipes.events import Stopped
from .console import command, quiet_libraries
from .predict import SkipBadRows
from .report import Report
from .report import dry_run as show_plan

if TYPE_CHECKING:
    from ..recipes.job import Flags

JobFile = Annotated[
    Path | None, typer.Argument(help="A YAML job file; flags override what it says.", show_default=False)
]


@command
def train(
    file: JobFile = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Hub id, folder, GGUF file, or package that ships a model.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="causal_lm, seq2seq_lm, seq_cls or token_cls.")] = None,
    train: Annotated[
        str | None, typer.Option("--train", help="Training rows: JSONL, CSV, Parquet, or a data set's name.")
    ] = None,
    eval: Annotated[
        str | None, typer.Option("--eval", help="Held-out rows: likewise, or a fraction such as 0.1.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="The column to read.")] = None,
    target: Annotated[str | None, typer.Option(help="The column to learn.")] = None,
    template: Annotated[str | None, typer.Option(help="The prompt, with columns in braces.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="A possible answer; repeat for each.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens kept of a row.")] = None,
    skip_bad_rows: SkipBadRows = False,
    method: Annotated[str | None, typer.Option(help="`peft methods` lists them.")] = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the method's config: r=8, layers_to_transform=15-29.")
    ] = None,
    trainer: Annotated[
        list[str] | None, typer.Option("--trainer", help="A training argument: learning_rate=1e-3.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder for adapter, plot and metrics.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the base: auto, float32, bfloat16, float16.")] = None,
    seed: Annotated[int | None, typer.Option(help="For the adapter's start, the order of rows, dropout.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be adapted, and stop.")] = False,
    every: Annotated[bool, typer.Option("--every", help="Show each layer in that table.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard what the output folder holds of an earlier run.")
    ] = False,
    stop_after: Annotated[
        int | None, typer.Option(help="Save and stop after so many steps; run again to go on.")
    ] = None,
) -> None:
    """Fine-tune a model on your rows. An interrupted run goes on where it stopped when it is started again."""
    flags: Flags = {
        "model": model,
        "task": task,
        "method": method,
        "output": output,
        "dtype": dtype,
        "seed": seed,
        "config": recipes.job.assignments(set or [], "--set"),
        "trainer": recipes.job.assignments(trainer or [], "--trainer"),
        "data": {
            "train": train,
            "eval": recipes.job.parse(eval, "--eval") if eval is not None else None,
            "text": text,
            "target": target,
            "template": template,
            "choices": choice or None,
            "max_length": max_length,
            "skip_bad_rows": skip_bad_rows or None,
        },
    }
    if stop_after is not None:
        recipes.checks.number("--stop-after", stop_after, 1)
    job = recipes.job.read(file, flags)
    quiet_libraries()
    with Report(every=every) as report:  # a run listens in its first process only
        run = recipes.run.Run(job, report)
        if dry_run:
            plan = run.dry_run()
            return show_plan(plan, every=every) if recipes.ranks.is_first() else None
        end = run.train(restart=restart, stop_after=stop_after)
    recipes.ranks.leave()
    if isinstance(end, Stopped) and end.asked:
        raise typer.Exit(130)
    return None
