"""`peft methods`: which methods there are, what each computes and supports."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

import peft

from .. import recipes
from .console import command, console, escape, facts, heading, table

if TYPE_CHECKING:
    from ..contract.method import Method

# What follows from the form in which a method states its maths.
SUPPORTS = {
    "delta": "any layer with a weight, quantised ones too; merges; several add up; per row",
    "weight": "any layer whose weight can be read; merges; several add up; per row",
    "before": "any layer with a weight; merges; several compose in order; per row",
    "after": "any layer; several compose in order; per row",
    "replace": "any module's own parameters; merges; several add up",
    "prompt": "the whole model; nothing to merge; per row",
}


@command
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in detail.", show_default=False)] = None,
) -> None:
    """List the methods: one sentence, formula and what each supports."""
    if name is not None:
        return detail(*recipes.saved.method(name))
    grid = table("method", "what it does", "formula", "supports")
    for key, method in sorted(peft.registry.methods().items()):
        grid.add_row(
            f"[bold]{escape(key.lower())}[/]", escape(method.summary), escape(method.formula), supports(method)
        )
    console.print(grid)
    facts(((kind, layer.summary) for kind, layer in peft.registry.kinds().items()), "Layers they work on")
    return None


def supports(method: type[Method]) -> str:
    return SUPPORTS.get(method.form, method.form)


def detail(key: str, method: type[Method]) -> None:
    facts(
        [
            ("what it does", method.summary),
            ("formula", method.formula),
            ("supports", supports(method)),
            ("paper", method.paper),
            ("config", method.config_class.__name__),
        ],
        key.lower(),
    )
    heading("Its config")
    grid = table("field (--set NAME=VALUE)", "default")
    for field in dataclasses.fields(method.config_class):
        if field.name not in ("peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode"):
            default = field.default_factory() if callable(field.default_factory) else field.default
            grid.add_row(field.name, escape(str(getattr(default, "value", default))))
    console.print(grid)
