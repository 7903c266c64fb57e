"""Runs both libraries once per test run, each in processes of its own, and hands out what they left."""

from __future__ import annotations

from pathlib import Path

import filelock
import pytest

from tests.live.live_exchange import Exchange


@pytest.fixture(scope="session")
def exchange(upstream_folder, tmp_path_factory) -> Exchange:
    root: Path = tmp_path_factory.getbasetemp()
    if root.name.startswith("popen-"):  # a worker of a parallel run: all of them share one exchange
        root = root.parent
    root = root / "live"
    with filelock.FileLock(f"{root}.lock"):
        return Exchange(root, upstream_folder).run()
