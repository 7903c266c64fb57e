"""Folders that commands write: nothing is replaced or removed but what the marker lists."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from peft.errors import UserError
from peft.recipes.outputs import MARKER, Output
from peft.recipes.writing import digest
from tests.hostile import examples, seed


def opened(folder: Path, command: str = "peft train") -> Output:
    output = Output(folder, command)
    output.__enter__()
    output.begin()
    return output


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MARKER)


def test_what_it_wrote_is_replaced_and_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    output = opened(folder)
    output.write("job.yaml", "a: 1")
    with output.written("kept/one") as part:
        part.mkdir()
        (part / "x.bin").write_bytes(b"x")
        (part / "y.bin").write_bytes(b"y")
    output.close()
    assert names(folder) == ["job.yaml", "kept/one/x.bin", "kept/one/y.bin"]

    (folder / "kept" / "mine.txt").write_text("mine")
    (folder / "kept" / "one" / "y.bin").write_bytes(b"changed")
    with Output(folder, "peft train") as again:
        assert again.is_own("job.yaml") and again.is_own("kept/one/x.bin") and not again.is_own("kept/one/y.bin")
        assert not again.is_whole("kept") and again.in_the_way("kept", "job.yaml") == ["kept/one/y.bin"]
        with pytest.raises(UserError, match=r"kept/one/y\.bin stands where"), again.written("kept/one") as part:
            part.mkdir()
            (part / "y.bin").write_bytes(b"new")
        again.write("job.yaml", "a: 2")
        again.remove("kept")
    assert names(folder) == ["job.yaml", "kept/mine.txt", "kept/one/y.bin"]
    assert (folder / "kept/one/y.bin").read_bytes() == b"changed" and (folder / "job.yaml").read_text() == "a: 2"
    assert sorted(p.name for p in folder.iterdir()) == [MARKER, "job.yaml", "kept"]


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "job.yaml").write_text("mine")
    file, link, dangling = tmp_path / "file", tmp_path / "link", tmp_path / "dangling"
    file.write_text("x")
    empty = tmp_path / "empty"
    empty.mkdir()
    link.symlink_to(empty)
    dangling.symlink_to(tmp_path / "nowhere")
    for folder, said in ((mine, "not empty"), (file, "is a file"), (link, "is a link"), (dangling, "is a link")):
        with pytest.raises(UserError, match=said):
            Output(folder, "peft train").__enter__()
    assert names(mine) == ["job.yaml"] and not list(empty.iterdir()) and not (tmp_path / "nowhere").exists()
    opened(empty, "peft merge").close()
    with pytest.raises(UserError, match="written by `peft merge`"):
        Output(empty, "peft train").__enter__()


def test_links_are_neither_followed_nor_replaced(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_text("x")
    output = opened(tmp_path / "run")
    output.write("sub/x", "x")
    output.write("y", "x")
    (tmp_path / "run/sub/x").unlink()
    (tmp_path / "run/sub").rmdir()
    (tmp_path / "run/sub").symlink_to(outside)
    (tmp_path / "run/y").unlink()
    (tmp_path / "run/y").symlink_to(outside / "x")
    for name in ("sub/x", "sub/new", "y"):
        with pytest.raises(UserError, match="stands where"):
            output.write(name, "new")
    output.remove("sub", "y")
    assert (outside / "x").read_text() == "x" and sorted(os.listdir(outside)) == ["x"]
    assert (tmp_path / "run/sub").is_symlink() and (tmp_path / "run/y").is_symlink()
    output.close()


def test_a_marker_names_nothing_outside_its_folder(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("x")
    opened(tmp_path / "run").close()
    marker = tmp_path / "run" / MARKER
    content = json.loads(marker.read_text())
    content["files"] = {"../victim": [digest(victim)], str(victim): [digest(victim)]}
    content["folders"], content["staging"] = [".."], "../.staging-x"
    (tmp_path / ".staging-x").mkdir()
    marker.write_text(json.dumps(content))
    with Output(tmp_path / "run", "peft train") as output:
        output.remove("..", str(victim), "")
    assert victim.exists() and (tmp_path / ".staging-x").is_dir()


def test_what_lies_aside_is_swept_and_a_marker_cut_short_is_no_obstacle(tmp_path: Path) -> None:
    output = opened(tmp_path / "run")
    (output.staging / "parts").mkdir(parents=True)
    (output.staging / "parts" / "half").write_text("x")
    os.close(output.lock or 0)
    output.lock = None  # killed
    (tmp_path / "run" / ".staging-mine").mkdir()
    opened(tmp_path / "run").close()
    assert not output.staging.exists() and (tmp_path / "run" / ".staging-mine").is_dir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / MARKER).write_text('{"about"')
    opened(tmp_path / "cut").close()
    assert json.loads((tmp_path / "cut" / MARKER).read_text())["made_by"] == "peft train"


def test_one_command_writes_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    output = opened(tmp_path / "run")
    with pytest.raises(UserError, match="Another command"):
        Output(tmp_path / "run", "peft train").__enter__()
    output.close()
    opened(tmp_path / "run").close()


def test_whatever_others_do_to_a_folder_their_files_stay(tmp_path: Path) -> None:
    """Random commands and random users on the same few names: what a user wrote last is there, byte for byte."""
    for n in range(examples(12)):
        draw = random.Random(seed(n))
        folder = tmp_path / str(n)
        places = ["a", "b/c", "b/d", "b/e/f"]
        users: dict[str, bytes] = {}
        for turn in range(25):
            name = draw.choice(places)
            if draw.random() < 0.4 and folder.exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                users[name] = f"user {turn}".encode()
                (folder / name).write_bytes(users[name])
                continue
            try:
                with Output(folder, "peft train") as output:
                    output.begin()
                    if draw.random() < 0.5:
                        output.write(name, f"command {turn}")
                    else:
                        output.remove(*draw.sample(["a", "b", "b/e", "b/d"], 2))
            except UserError:
                assert users
            for own, content in users.items():
                assert (folder / own).read_bytes() == content, (n, turn, own)
