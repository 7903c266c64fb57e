"""Jobs: values on the command line, ranges of layers, and what makes two jobs different runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft.errors import UserError
from peft.recipes import job


def test_numbers_and_lists_on_the_command_line() -> None:
    given = job.assignments(["learning_rate=1e-3", "target_modules=[q, v]", "bias=none", "a=.5"], "--set")
    assert given == {"learning_rate": 1e-3, "target_modules": ["q", "v"], "bias": "none", "a": 0.5}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("15-29", list(range(15, 30))),
        ("0-3,8", [0, 1, 2, 3, 8]),
        (" 0 - 1 , 4", [0, 1, 4]),
        ("7", [7]),
        ("5-5", [5]),
        (["0-3", 8, "10-11"], [0, 1, 2, 3, 8, 10, 11]),
        ([4, 2], [4, 2]),
        ([], []),
        (7, 7),
        (None, None),
    ],
)
def test_layers_may_be_given_as_ranges(given: Any, expected: Any) -> None:
    assert job.layers(given) == expected
    assert job.layers(job.parse("null" if given is None else str(given).replace("'", ""), "--set")) == (
        7 if given == "7" else expected
    )


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("3-1", "write 1-3"),
        ("a-b", "'a-b'"),
        ("1-", "'1-'"),
        ("1-2-3", "'1-2-3'"),
        ("1,,2", "''"),
        ("", "''"),
        ("1..3", "'1..3'"),
        ([1.5], "'1.5'"),
        ([-1], "'-1'"),
        (True, "'True'"),
        ({"from": 3}, "from"),
    ],
)
def test_malformed_ranges_of_layers_are_named(given: Any, named: str) -> None:
    with pytest.raises(UserError, match="config.layers_to_transform") as error:
        job.layers(given)
    assert named in str(error.value)


def test_ranges_are_checked_when_the_job_is_read_and_kept_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("model: x\nconfig: {layers_to_transform: 0-3}")
    assert job.read(file, {}).config == {"layers_to_transform": "0-3"}
    file.write_text("model: x\nconfig: {layers_to_transform: 3-0}")
    with pytest.raises(UserError, match="write 0-3"):
        job.read(file, {})


def test_the_same_layers_written_otherwise_are_the_same_run() -> None:
    one = job.Job(model="x", config={"r": 4, "layers_to_transform": "1-3"})
    other = one.as_dict() | {"config": {"r": 4, "layers_to_transform": [1, 2, 3]}, "output": "elsewhere"}
    assert one.differences(other) == []
    other["config"]["layers_to_transform"] = [1, 2]
    assert one.differences(other) == ["config.layers_to_transform"]
    assert one.differences(other | {"config": None}) == ["config"]
