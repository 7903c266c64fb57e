"""Base models: where they are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft.errors import UserError
from peft.recipes import bases as models


def test_models_are_found_by_folder_file_package_and_hub_id(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert models.resolve(str(home / "llama")) == models.Source(str(home / "llama"))
    (tmp_path / "some_model").mkdir()
    (tmp_path / "some_model" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (tmp_path / "some_model" / "m.gguf").touch()
    found = models.Source(str(tmp_path / "some_model"), "m.gguf")
    assert (
        models.resolve(str(tmp_path / "some_model")) == models.resolve(str(tmp_path / "some_model" / "m.gguf")) == found
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert models.resolve("some-model") == found
    assert models.resolve("owner/name") == models.Source("owner/name")
    assert models.resolve("owner/name/m.gguf") == models.Source("owner/name", "m.gguf")


@pytest.mark.parametrize("spec", ["./foo", "/foo", "~/foo", "foo/", "a/b/c", "a\\\\b"])
def test_a_path_that_leads_nowhere_is_one(spec: str) -> None:
    with pytest.raises(UserError, match="no folder or GGUF file"):
        models.resolve(spec)


@pytest.mark.parametrize("spec", ["foo", "models/foo", "not an id"])
def test_a_name_that_is_nowhere_is_first_a_folder_that_is_missing(spec: str) -> None:
    with pytest.raises(UserError, match=f"^There is no folder '{spec}' in .* model hub"):
        models.load_config(models.resolve(spec))


def test_digests_tell_a_model_from_another(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text(name)
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(models.SMALL + 1)
    found = models.digests(models.Source(str(tmp_path)))
    assert {Path(p).name for p in found} == {"config.json", "model.safetensors", "large.bin"}
    assert found[str(tmp_path / "large.bin")] == f"{models.SMALL + 1} bytes"
    (tmp_path / "config.json").write_text("config.jsoN")
    changed = models.digests(models.Source(str(tmp_path)))
    assert {p for p in found if changed[p] != found[p]} == {str(tmp_path / "config.json")}
    assert models.digests(models.Source("owner/name")) == {}
