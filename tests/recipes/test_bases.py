"""Base models: where they are found."""

from __future__ import annotations

from pathlib import Path

import pytest

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
