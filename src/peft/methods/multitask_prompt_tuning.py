"""Multitask prompt tuning: task t's prompt is P ⊙ (U_t V_t), a shared one times a low-rank one (arXiv 2303.02861).

P[n, d], U[tasks, n, r], V[tasks, r, d]. A prompt trained on source tasks starts one for a target task: with the mean
or one of the tasks' factors, or with P alone.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config_fields import require
from ..contract.site import Site
from ..contract.tensors import Stored
from ..core.files.tensors import read_weights
from ..errors import CheckpointError
from .prompt_tuning import PromptTuning, PromptTuningConfig, chosen

__all__ = ["MultitaskPromptTuningConfig", "MultitaskPromptTuningInit"]


class MultitaskPromptTuningInit(str, enum.Enum):
    """Where the prompt starts: TEXT or RANDOM, or from source tasks: their average, one of them, or P alone."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multitask prompt tuning (arXiv 2303.02861); forward takes `task_ids`, one per row.

    num_tasks, num_ranks: tasks and r. prompt_tuning_init: see `MultitaskPromptTuningInit`.
    prompt_tuning_init_state_dict_path: the weights file of the source prompt. prompt_tuning_init_task: which task's
    factors EXACT_SOURCE_TASK takes.
    """

    own_type = "MULTITASK_PROMPT_TUNING"
    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM  # type: ignore[assignment]
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "num_ranks")
        require(self, "num_tasks")

    def choice(self, value: Any) -> Any:
        return chosen(MultitaskPromptTuningInit, "prompt_tuning_init", value)


class MultitaskPromptTuning(PromptTuning):
    peft_type = "MULTITASK_PROMPT_TUNING"
    config_class = MultitaskPromptTuningConfig
    summary = "Prompt tuning for several tasks at once: a shared prompt times a low-rank one for each task."
    formula = "f([P ⊙ U_t V_t; E(x)])"
    paper = "arXiv 2303.02861"
    tensors = {**PromptTuning.tensors, "prefix_task_cols": Stored(), "prefix_task_rows": Stored()}
    prompts_decoder = True
    examples = (
        {"num_virtual_tokens": 3},
        {"num_virtual_tokens": 2, "num_ranks": 2, "num_tasks": 1, "prompt_tuning_init": "RANDOM"},
    )

    def __init__(self, config: MultitaskPromptTuningConfig, site: Site) -> None:
        super().__init__(config, site)
        n, d = self.embedding.weight.shape
        tasks, r = config.num_tasks or 1, config.num_ranks or 1
        self.prefix_task_cols = site.empty(tasks, n, r)
        self.prefix_task_rows = site.empty(tasks, r, d)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        super().reset(rng, site)
        self.prefix_task_cols.normal_(std=0.02, generator=rng)
        self.prefix_task_rows.normal_(std=0.02, generator=rng)
        start = self.config.prompt_tuning_init.value
        if start in ("TEXT", "RANDOM"):
            return
        path = self.config.prompt_tuning_init_state_dict_path
        if path is None:
            raise ValueError(
                f"prompt_tuning_init_state_dict_path needs to be specified with prompt_tuning_init={start}"
            )
        source = read_weights(path).tensors
        wanted = {"prompt_embeddings": self.embedding.weight}
        if start != "ONLY_SOURCE_SHARED":
            wanted |= {"prefix_task_cols": self.prefix_task_cols, "prefix_task_rows": self.prefix_task_rows}
        for name, own in wanted.items():
            if name not in source:
                raise CheckpointError(f"{path} holds no {name}: it is no multitask prompt.")
            value = source[name]
            if name != "prompt_embeddings":
                at = self.config.prompt_tuning_init_task
                value = value.mean(0, keepdim=True) if start == "AVERAGE_SOURCE_TASKS" else value[at : at + 1]
            if value.shape != own.shape:
                raise CheckpointError(
                    f"{path}: {name} gives {tuple(value.shape)}, this prompt needs {tuple(own.shape)}. Starting from "
                    "source tasks needs num_tasks=1 and the source's num_virtual_tokens and num_ranks."
                )
            own.copy_(value)

    def prompt(self, tasks: Tensor | None) -> Tensor:
        count = len(self.prefix_task_cols)
        if tasks is None:
            if count > 1:
                raise ValueError(f"task_ids cannot be None: this prompt has {count} tasks, pass one task id per row.")
            tasks = torch.zeros(1, dtype=torch.long, device=self.prefix_task_cols.device)
        tasks = tasks.to(self.prefix_task_cols.device)
        return self.embedding.weight * (self.prefix_task_cols[tasks] @ self.prefix_task_rows[tasks])
