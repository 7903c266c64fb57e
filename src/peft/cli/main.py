"""Assembles the commands into one app."""

from __future__ import annotations

import typer

from . import generate, inspect, merge, methods, predict, train

app = typer.Typer(
    name="peft",
    help="Fine-tune a model by training few parameters, use the adapter, merge it, look into it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train.train)
app.command("generate")(generate.generate)
app.command("predict")(predict.predict)
app.command("merge")(merge.merge)
app.command("inspect")(inspect.inspect)
app.command("methods")(methods.methods)
