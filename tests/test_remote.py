"""Files of an adapter: local folders without a network, the hub with clear errors."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.utils import EntryNotFoundError

from peft.remote import find_file, push_folder

NAME = "adapter_config.json"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter's folder with a second adapter below it; every use of a socket fails the test."""

    def blocked(*args: object, **kwargs: object) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket, "socket", blocked)
    monkeypatch.setattr(socket, "create_connection", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", blocked)
    root = tmp_path / "adapter"
    (root / "second").mkdir(parents=True)
    (root / NAME).write_text("{}")
    (root / "second" / NAME).write_text("{}")
    return root


class Hub:
    """What was asked of the hub; it answers with a path or an error."""

    def __init__(self, answer: str | Exception) -> None:
        self.answer = answer
        self.asked: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def __call__(self, *args: object, **kwargs: object) -> str:
        self.asked.append((args, kwargs))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def hub(monkeypatch: pytest.MonkeyPatch, answer: str | Exception) -> Hub:
    made = Hub(answer)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made)
    return made


# -- local folders ----------------------------------------------------------------------------------------------------------
def test_a_local_folder_never_touches_the_network(folder):
    assert find_file(str(folder), NAME, None, {}) == str(folder / NAME)
    assert find_file(str(folder), NAME, "second", {"revision": "main"}) == str(folder / "second" / NAME)
    assert find_file(str(folder), "missing.bin", None, {}) is None
    assert find_file(str(folder), NAME, "missing", {}) is None
    assert find_file(str(folder), "second", None, {}) is None  # a folder is no file


@pytest.mark.parametrize("path", ["adapter", "near/adapter"])
def test_nor_does_one_whose_path_could_be_a_repositorys_name(folder, monkeypatch, path):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "near").mkdir()
    (folder.parent / "near" / "adapter").symlink_to(folder)
    assert find_file(path, NAME, None, {}) == f"{path}/{NAME}"
    assert find_file(path, "missing.bin", None, {}) is None


@pytest.mark.parametrize("path", ["{}/gone", "./gone", "../gone", "~/gone", "a/b/c"])
def test_a_path_that_does_not_exist_is_no_repository(folder, path):
    assert find_file(path.format(folder), NAME, None, {}) is None


@pytest.mark.parametrize("subfolder", ["..", "../beside", "second/../../beside", "{}/beside"])
def test_a_subfolder_leads_nowhere_else(folder, subfolder):
    beside = folder.parent / "beside"
    beside.mkdir()
    (beside / NAME).write_text("{}")
    (folder.parent / NAME).write_text("{}")
    subfolder = subfolder.format(folder.parent)
    with pytest.raises(ValueError, match="leads out of") as e:
        find_file(str(folder), NAME, subfolder, {})
    assert repr(subfolder) in str(e.value) and str(folder) in str(e.value)


def test_a_subfolder_leads_into_no_neighbour_whose_name_begins_alike(folder):
    beside = folder.parent / f"{folder.name}_2"
    beside.mkdir()
    (beside / NAME).write_text("{}")
    with pytest.raises(ValueError, match="leads out of"):
        find_file(str(folder), NAME, f"../{beside.name}", {})


def test_a_link_out_of_the_folder_is_no_way_out(folder):
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / NAME).write_text("{}")
    (folder / "link").symlink_to(outside)
    with pytest.raises(ValueError, match="'link' leads out of"):
        find_file(str(folder), NAME, "link", {})


# -- the hub ----------------------------------------------------------------------------------------------------------------
def test_another_name_is_a_repositorys(monkeypatch):
    asked = hub(monkeypatch, "/cache/file").asked
    assert find_file("someone/adapter", NAME, "second", {}) == "/cache/file"
    assert asked == [(("someone/adapter", NAME), {"subfolder": "second"})]


def test_only_what_the_hub_understands_is_passed_on(monkeypatch):
    asked = hub(monkeypatch, "/cache/file").asked
    given = {
        "revision": "v1",
        "token": "t",
        "cache_dir": "c",
        "trust_remote_code": True,
        "proxies": {},
        "device": "cpu",
    }
    find_file("someone/adapter", NAME, None, given)
    ((_, kwargs),) = asked
    assert kwargs == {"subfolder": None, "revision": "v1", "token": "t", "cache_dir": "c"}


def test_a_file_that_a_repository_lacks_is_none(monkeypatch):
    hub(monkeypatch, EntryNotFoundError("404"))
    assert find_file("someone/adapter", NAME, None, {}) is None


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("401 Unauthorized")])
def test_errors_of_the_hub_name_the_adapter_and_the_file(monkeypatch, error):
    hub(monkeypatch, error)
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at 'someone/adapter'") as e:
        find_file("someone/adapter", NAME, None, {})
    assert f"{type(error).__name__}: {error}" in str(e.value) and e.value.__cause__ is error


def test_pushing_uploads_what_was_written(monkeypatch):
    done: list[tuple[str, object]] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            done.append(("token", token))

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> None:
            done.append(("create", (repo_id, private, exist_ok)))

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> SimpleNamespace:
            files = {p.name: p.read_text() for p in folder_path.iterdir()}
            done.append(("upload", (repo_id, files, commit_message)))
            return SimpleNamespace(folder=folder_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)

    def write(path: str) -> None:
        (Path(path) / "file").write_text("content")

    commit = push_folder(write, "me/adapter", token="t", private=True)
    assert done == [
        ("token", "t"),
        ("create", ("me/adapter", True, True)),
        ("upload", ("me/adapter", {"file": "content"}, "Upload adapter")),
    ]
    assert not commit.folder.exists()  # it was a temporary one
    push_folder(write, "me/adapter", commit_message="Second")
    assert done[-1][1][-1] == "Second"
