"""The heads of a model: its output embedding, and those that a task brings."""

from __future__ import annotations

from torch import nn

from ...config import PeftConfig
from .embeddings import output_head

HEADS_BY_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def prepare_head(model: nn.Module, config: PeftConfig, loading: bool = False) -> None:
    """Newly initialised heads train and are saved with the adapter, for every task type that has one."""
    task = getattr(config.task_type, "value", config.task_type)
    if task not in HEADS_BY_TASK or not hasattr(config, "modules_to_save"):
        return
    present = [n for n in HEADS_BY_TASK[task] if any(name.split(".")[-1] == n for name, _ in model.named_modules())]
    named = config.modules_to_save
    if named is None:
        config.modules_to_save = present or None
    elif loading:  # upstream's files name every head a task may have
        config.modules_to_save = [n for n in dict.fromkeys(named) if n in present or n not in HEADS_BY_TASK[task]]
    else:
        config.modules_to_save = [*named, *(n for n in present if n not in named)]


HEADS = ("classifier", "score", "qa_outputs")  # names that transformers gives newly initialised heads


def output_heads(model: nn.Module) -> set[str]:
    """Paths of the output embedding and of classification heads: what `all-linear` leaves alone."""
    heads = set()
    head = output_head(model)
    for name, module in model.named_modules():
        if head is not None and (module is head or getattr(head, "base_layer", None) is module):
            heads.add(name.removesuffix(".base_layer"))
    return heads | {name for name, _ in model.named_children() if name in HEADS}
