"""Jobs: values on the command line, ranges of layers, and what makes two jobs different runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft.errors import UserError
from peft.recipes import job
from peft.recipes.outputs import MARKER, Output


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


def test_a_record_has_full_paths_and_means_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "zero.json"):
        Path(name).touch()
    Path("base").mkdir()
    data = job.Data(train="rows.jsonl", eval="owner/set:test")
    given = job.Job(model="base", data=data, trainer={"deepspeed": "zero.json", "optim": "base"}, output="run")
    found = given.located()
    assert found["model"] == str(tmp_path / "base") and found["output"] == str(tmp_path / "run")
    assert found["data"]["train"] == str(tmp_path / "rows.jsonl") and found["data"]["eval"] == "owner/set:test"
    assert found["trainer"] == {"deepspeed": str(tmp_path / "zero.json"), "optim": "base"}
    assert given.model == "base" and given.differences(found) == given.differences(given.as_dict()) == []
    assert given.differences(found | {"model": "other"}) == ["model"]
    with Output(tmp_path / "run", "peft train") as output:
        output.begin()
        output.write("job.yaml", job.yaml.safe_dump(found))
    Path("run").rename("moved")
    monkeypatch.chdir("/")
    read = job.read(tmp_path / "moved" / "job.yaml", {})
    assert read.output == str(tmp_path / "moved") and read.data.train == str(tmp_path / "rows.jsonl")
    assert job.read(tmp_path / "moved" / "job.yaml", {"output": "there"}).output == "there"


@pytest.mark.parametrize("content", ["", " \n", "\0" * 100])
def test_an_empty_job_file_is_told_as_such(tmp_path: Path, content: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=r"job\.yaml is empty\."):
        job.read(file, {})
    (tmp_path / MARKER).touch()
    with pytest.raises(UserError, match="empty, as a crash while it was written"):
        job.read(file, {})
