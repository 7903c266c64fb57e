"""Multitask prompt tuning: task t's prompt is P ⊙ (U_t V_t), a shared one times a low-rank one (arXiv 2303.02861).

P[n, d], U[tasks, n, r], V[tasks, r, d]. A prompt trained on source tasks starts one for a target task: with the mean
or one of the tasks' factors, or with P alone.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config_fields import member, ranged
from ..config_values import AtLeast0
from ..contract.site import Site
from ..contract.tensors import Stored
from ..inits.prompts import copy_from_tasks
from .prompt_tuning import PromptTuning, PromptTuningConfig

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
    prompt_tuning_init: MultitaskPromptTuningInit | str = member(MultitaskPromptTuningInit.RANDOM)
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: AtLeast0 | None = 0
    num_ranks: int | None = ranged(1)
    num_tasks: int | None = ranged(1)


class MultitaskPromptTuning(PromptTuning):
    peft_type = "MULTITASK_PROMPT_TUNING"
    config_class = MultitaskPromptTuningConfig
    summary = "Prompt tuning for several tasks at once: a shared prompt times a low-rank one for each task."
    formula = "f([P ⊙ U_t V_t; E(x)])"
    paper = "arXiv 2303.02861"
    tensors = {
        **PromptTuning.tensors,
        "prefix_task_cols": Stored(shape="config.num_tasks rows config.num_ranks"),
        "prefix_task_rows": Stored(shape="config.num_tasks config.num_ranks config.token_dim"),
    }
    prompts_decoder = True
    prefix_task_cols: Tensor
    prefix_task_rows: Tensor
    examples = (
        {"num_virtual_tokens": 3},
        {"num_virtual_tokens": 2, "num_ranks": 2, "num_tasks": 1, "prompt_tuning_init": "RANDOM"},
    )

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        super().reset(rng, site)
        factors = {"prefix_task_cols": self.prefix_task_cols, "prefix_task_rows": self.prefix_task_rows}
        for p in factors.values():
            p.normal_(std=0.02, generator=rng)
        start, path = self.config.prompt_tuning_init.value, self.config.prompt_tuning_init_state_dict_path
        if start in ("TEXT", "RANDOM"):
            return
        if path is None:
            raise ValueError(
                f"prompt_tuning_init_state_dict_path needs to be specified with prompt_tuning_init={start}"
            )
        shared, taken = {"prompt_embeddings": self.embedding.weight}, {} if start == "ONLY_SOURCE_SHARED" else factors
        average, task = start == "AVERAGE_SOURCE_TASKS", self.config.prompt_tuning_init_task
        copy_from_tasks(path, shared, taken, task, average)

    def prompt(self, tasks: Tensor | None) -> Tensor:
        count = len(self.prefix_task_cols)
        if tasks is None:
            if count > 1:
                raise ValueError(f"task_ids cannot be None: this prompt has {count} tasks, pass one task id per row.")
            tasks = torch.zeros(1, dtype=torch.long, device=self.prefix_task_cols.device)
        tasks = tasks.to(self.prefix_task_cols.device)
        return self.embedding.weight * (self.prefix_task_cols[tasks] @ self.prefix_task_rows[tasks])
