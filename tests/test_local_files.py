"""Files that are replaced together and whole; JSON within bounds. Crashes: `hostile/test_crashes.py`."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from peft.local_files import LONGEST, damaged, json_object, read_json, replace_files


def writer(text: str):
    return lambda path: Path(path).write_text(text)


def test_files_are_replaced_in_their_order_and_an_older_form_goes(tmp_path):
    (tmp_path / "old.bin").write_text("old")
    replace_files(str(tmp_path), {"a": writer("1"), "b": writer("2")}, instead_of=["old.bin", "never"])
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "1", "b": "2"}


def test_what_fails_to_be_written_changes_nothing(tmp_path):
    replace_files(str(tmp_path), {"a": writer("1")})

    def fail(path):
        Path(path).write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_files(str(tmp_path), {"a": writer("2"), "b": fail}, instead_of=["a"])
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "1"}


def test_files_and_folder_are_synchronised_and_an_equal_file_is_left(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), fsync(fd)))
    replace_files(str(tmp_path), {"a": writer("1"), "b": writer("2")})
    at = {p.name: p.stat().st_ino for p in (tmp_path / "a", tmp_path / "b", tmp_path)}
    assert synced == [at["a"], at["b"], at[tmp_path.name]]
    replace_files(str(tmp_path), {"a": writer("3"), "b": writer("2")})
    assert (tmp_path / "b").stat().st_ino == at["b"] and (tmp_path / "a").read_text() == "3"
    assert len(synced) == 5


def test_the_files_have_the_rights_that_the_process_gives(tmp_path):
    mask = os.umask(0o027)
    try:
        replace_files(str(tmp_path), {"a": writer("1")})
    finally:
        os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_threads_write_beside_each_other(tmp_path):
    def work(n):
        for _ in range(20):
            replace_files(str(tmp_path), {"a": writer(f"{n}" * 9)})

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and len(set((tmp_path / "a").read_text())) == 1


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[1]", "JSON object, found list"),
        (b"null", "JSON object, found NoneType"),
        (b"3", "found int"),
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "utf-8"),
        (b'{"r": 1, "r": 2}', "'r' is there twice"),
        (b'{"a": {"r": 1, "r": 2}}', "'r' is there twice"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_json_that_is_no_object_is_told_with_its_file(data, said, tmp_path):
    path = tmp_path / "some.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"some\.json.*{said}"):
        read_json(path, "the config")


def test_json_is_read_and_a_huge_file_is_not(tmp_path):
    path = tmp_path / "some.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": [1]}).encode())
    assert read_json(path, "the config") == {"a": [1]} == json_object('{"a": [1]}')
    with path.open("wb") as f:
        f.truncate(2 * LONGEST)
    with pytest.raises(ValueError, match=rf"some\.json has {2 * LONGEST} bytes"):
        read_json(path, "the config")
    assert "x.bin (3 bytes) is no readable weights file (why)" in str(damaged("x.bin", 3, "why"))
