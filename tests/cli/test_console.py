"""Errors without a traceback, and numbers for people."""

from __future__ import annotations

import errno
import os

import pytest
import typer
from safetensors import SafetensorError

from peft.cli import console
from peft.errors import UserError


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (UserError("say [this]"), "Error: say [this]"),
        (KeyError("the message"), "Error: the message"),
        (ValueError(""), "Error: ValueError"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    error: Exception, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @console.command
    def fails() -> None:
        raise error

    with pytest.raises(typer.Exit) as end:
        fails()
    said = capsys.readouterr().err
    assert end.value.exit_code == 2 and said.startswith(shown)
    assert ("PEFT_TRACEBACK" in said) == (not isinstance(error, UserError))
    monkeypatch.setenv("PEFT_TRACEBACK", "1")
    with pytest.raises(type(error)):
        fails()


def wrapped() -> Exception:
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/x.bin")
    except OSError as error:
        made = AttributeError("in the clean-up")
        made.__context__ = error
        return made


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"),
            "a/b: No space left on device. The disk is full. Free",
        ),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "a/b"), "a/b: Permission denied. You may not"),
        (
            SafetensorError("Error: I/O error: No space left on device (os error 28)"),
            "No space left on device. The disk",
        ),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
            "a file could not be written",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
            "a file could not be written",
        ),
        (wrapped(), "out/x.bin: No space left on device. The disk is full."),
    ],
)
def test_a_system_that_refuses_to_write_is_one_message(
    error: Exception, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @console.command
    def fails() -> None:
        raise error

    with pytest.raises(typer.Exit) as end:
        fails()
    assert end.value.exit_code == 2 and capsys.readouterr().err.startswith(f"Error: {shown}")


def test_bugs_keep_their_traceback_and_exits_their_code() -> None:
    @console.command
    def run(error: BaseException) -> None:
        raise error

    with pytest.raises(AttributeError):
        run(AttributeError("a bug"))
    with pytest.raises(typer.Exit) as end:
        run(typer.Exit(130))
    assert end.value.exit_code == 130


def test_numbers_for_people() -> None:
    assert [console.size(n) for n in (0, 999, 1_000, 2_340_000, 5e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "2.3 MB",
        "5000.0 GB",
    ]
    assert console.shape((2, 3)) == "2×3" and console.shape(None) == ""
