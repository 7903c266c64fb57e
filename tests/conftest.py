"""Shared set-up: no network, few threads, quiet third parties."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(scope="session")
def upstream_folder() -> Path:
    """Where huggingface/peft is installed aside; a process of its own imports it from there."""
    found = Path(os.environ.get("PEFT_UPSTREAM") or Path(sys.prefix) / "upstream")
    if not (found / "peft").is_dir():
        pytest.skip("huggingface/peft 0.21.2 is not installed aside; `make install` does that")
    return found


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)
