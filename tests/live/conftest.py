"""Runs both libraries once per test run, each in processes of its own, and hands out what they left."""

from __future__ import annotations

from pathlib import Path

import filelock
import pytest
from live_exchange import Exchange, upstream


@pytest.fixture(scope="session")
def exchange(tmp_path_factory) -> Exchange:
    if upstream() is None:
        pytest.skip("huggingface/peft 0.21.2 is not installed aside; `make install` does that")
    root: Path = tmp_path_factory.getbasetemp()
    if root.name.startswith("popen-"):  # a worker of a parallel run: all of them share one exchange
        root = root.parent
    root = root / "live"
    with filelock.FileLock(f"{root}.lock"):
        return Exchange(root).run()
