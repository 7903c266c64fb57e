"""Starts of prompts: the tokens of a text, a prompt trained on other tasks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.files.tensors import read_weights
from ..errors import CheckpointError


def text_ids(text: str, n: int, tokenizer_name: str, options: Mapping[str, object]) -> list[int]:
    """The text's tokens, repeated or cut to n. Remote code is never run for it."""
    from transformers import AutoTokenizer

    options = {k: v for k, v in options.items() if k != "trust_remote_code"}
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name, **options)
    ids = list(tokenizer(text)["input_ids"])
    if not ids:
        raise ValueError("prompt_tuning_init_text gives no tokens: state a text.")
    return (ids * (n // len(ids) + 1))[:n]


@torch.no_grad()
def copy_from_tasks(
    path: str, shared: Mapping[str, Tensor], factors: Mapping[str, Tensor], task: int, average: bool
) -> None:
    """Copy a source prompt into tensors, named as the weights file at `path` has them.

    factors: those of which the file has one per source task; the task's are taken, or their average.
    """
    source = read_weights(path).tensors
    for name, own in {**shared, **factors}.items():
        if name not in source:
            raise CheckpointError(f"{path} holds no {name}: it is no multitask prompt.")
        value = source[name]
        if name in factors:
            value = value.mean(0, keepdim=True) if average else value[task : task + 1]
        if value.shape != own.shape:
            raise CheckpointError(
                f"{path}: {name} gives {tuple(value.shape)}, this prompt needs {tuple(own.shape)}. Starting from "
                "source tasks needs num_tasks=1 and the source's num_virtual_tokens and num_ranks."
            )
        own.copy_(value)
