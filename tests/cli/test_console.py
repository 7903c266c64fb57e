"""Errors without a traceback, and numbers for people."""

from __future__ import annotations

import pytest
import typer

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
