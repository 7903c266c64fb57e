"""What all commands share: the console, errors without a traceback, and how numbers are written."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import UserError

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

# Quantised back ends that tell at import which optional kernels they lack.
for _chatty in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(_chatty).setLevel(logging.ERROR)

P = ParamSpec("P")
T = TypeVar("T")

# What bad input raises, here and in the libraries underneath. Anything else is a bug and keeps its traceback.
BAD_INPUT = (ValueError, TypeError, KeyError, OSError, RuntimeError, ImportError, NotImplementedError, yaml.YAMLError)


def command(function: Callable[P, T]) -> Callable[P, T]:
    """Turns the errors of bad input into one message and exit code 2. PEFT_TRACEBACK=1 shows where they come from."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if os.environ.get("PEFT_TRACEBACK", "0") not in ("", "0"):
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except typer.Exit:  # a RuntimeError to Python, and no error
            raise
        except BAD_INPUT as error:
            # str() of a KeyError is the repr of its message
            message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
            errors.print(f"[bold red]Error:[/] {escape(message.strip() or type(error).__name__)}", soft_wrap=True)
            if not isinstance(error, UserError):
                errors.print("[dim](PEFT_TRACEBACK=1 shows where this comes from)[/]")
            raise typer.Exit(2) from None

    return run


def quiet_libraries() -> None:
    """Our own messages and progress instead of those of the libraries underneath."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def heading(text: str) -> None:
    """A line above a table; not the table's own title, which wraps at the table's width."""
    console.print(f"\n[bold]{escape(text)}[/]", soft_wrap=True)


def table(*columns: str, right: Iterable[str] = ()) -> Table:
    grid = Table(header_style="bold", box=None, pad_edge=False)
    for column in columns:
        grid.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return grid


def facts(rows: Iterable[tuple[str, object]], title: str | None = None) -> None:
    """Prints name and value, one a line; leaves out what is None."""
    if title:
        heading(title)
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for name, value in rows:
        if value is not None:
            grid.add_row(name, escape(str(value)))
    console.print(grid)


def size(count: float) -> str:
    """Bytes for people: `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def shape(sizes: Iterable[int] | None) -> str:
    return "×".join(str(s) for s in sizes) if sizes is not None else ""
