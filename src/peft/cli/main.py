"""Assembles the commands into one app."""

from __future__ import annotations

import typer

from . import flags, generate, inspect, merge, methods, predict, train

app = typer.Typer(
    name="peft",
    help="Fine-tune a model by training few parameters, use the adapter, merge it, look into it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train", cls=flags.Command)(train.train)
app.command("generate", cls=flags.Command)(generate.generate)
app.command("predict", cls=flags.Command)(predict.predict)
app.command("merge", cls=flags.Command)(merge.merge)
app.command("inspect", cls=flags.Command)(inspect.inspect)
app.command("methods", cls=flags.Command)(methods.methods)
