"""What all commands share: the console, errors without a traceback, and how numbers are written."""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import UserError
from ..recipes import ranks

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

# Quantised back ends that tell at import which optional kernels they lack.
for _chatty in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(_chatty).setLevel(logging.ERROR)

P = ParamSpec("P")
T = TypeVar("T")

# What bad input raises, here and in the libraries underneath. Anything else is a bug and keeps its traceback.
BAD_INPUT = (ValueError, TypeError, KeyError, OSError, RuntimeError, ImportError, NotImplementedError, yaml.YAMLError)


# What the system says when it cannot write, and what to do about it.
SYSTEM = {
    errno.ENOSPC: "The disk is full. Free some space and run the same command again.",
    errno.EDQUOT: "Your quota on this disk is used up. Free some space and run the same command again.",
    errno.EFBIG: "The file would be larger than this system allows.",
    errno.EROFS: "That disk can only be read. Give a place that can be written to.",
    errno.EACCES: "You may not read or write there. Change the permissions, or give another place.",
    errno.EPERM: "You may not read or write there. Change the permissions, or give another place.",
}
# How libraries that write by themselves tell it: safetensors quotes the system, torch's archives say only this.
QUOTED = re.compile(r"os error (\d+)|[Ee]rrno (\d+)")
TORCH_WRITES = ("PytorchStreamWriter failed", "inline_container.cc")


def system_error(error: BaseException | None) -> OSError | None:
    """The refusal of the operating system that an error is about, however a library has wrapped it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in SYSTEM:
            return error
        quoted = QUOTED.search(str(error))
        number = int(quoted[1] or quoted[2]) if quoted else 0
        if number in SYSTEM:
            return OSError(number, os.strerror(number))
        if isinstance(error, RuntimeError) and any(word in str(error) for word in TORCH_WRITES):
            return OSError(errno.ENOSPC, "a file could not be written to its end")
        error = error.__cause__ or error.__context__
    return None


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
        except Exception as error:
            refused = None if isinstance(error, UserError) else system_error(error)
            if refused is not None:
                at = f"{refused.filename}: " if refused.filename else ""
                message = f"{at}{refused.strerror}. {SYSTEM[refused.errno or 0]}"
            elif isinstance(error, BAD_INPUT):
                # str() of a KeyError is the repr of its message
                message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
            else:
                raise
            if not ranks.speaks():  # another process of this run has said it
                raise typer.Exit(2) from None
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
    if not ranks.is_first():
        warnings.simplefilter("ignore")


def heading(text: str) -> None:
    """A line above a table; not the table's own title, which wraps at the table's width."""
    console.print(f"\n[bold]{escape(text)}[/]", soft_wrap=True)


def table(*columns: str, right: Iterable[str] = (), whole: Iterable[str] = ()) -> Table:
    """A table without lines. right: columns of numbers; they and those in `whole` are never broken over lines."""
    grid = Table(header_style="bold", box=None, pad_edge=False)
    for column in columns:
        number = column in right
        grid.add_column(
            column, justify="right" if number else "left", overflow="fold", no_wrap=number or column in whole
        )
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
