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


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory) -> Path:
    """A folder with a small Llama, for what loads a model with its weights in codes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)
