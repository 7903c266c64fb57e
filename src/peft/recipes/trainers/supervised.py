"""transformers' Trainer with two changes: batches that resume exactly, and logits only where the loss reads them.

Its callbacks tell the run's events and keep methods informed that change with the steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.data.data_collator import DataCollator
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..bases import Model
from ..data import Rows
from ..events import Logged, OnEvent, Step, TrainingEnded
from ..likelihood import takes
from ..stopping import memory

Inputs: TypeAlias = dict[str, Any]  # a model's arguments by name: a batch's tensors, and numbers beside them


class LengthGroups(Sampler[int]):
    """Rows of similar length together, in an order that depends on seed and epoch alone.

    transformers' own draws from torch's global generator, so a resumed run would see other batches.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        batches = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        groups = [batches[i : i + self.batch_size] for i in range(0, len(batches), self.batch_size)]
        # the longest batch stays first (memory runs out at once or never), the others must not come by length
        order = [0, *(1 + torch.randperm(len(groups) - 1, generator=generator)).tolist()] if len(groups) > 1 else [0]
        full = [g for g in (groups[i] for i in order) if len(g) == self.batch_size]
        return iter([i for g in full + [g for g in groups if len(g) < self.batch_size] for i in g])


class AdapterTrainer(Trainer):
    """The Trainer of `peft train`."""

    def _get_train_sampler(self, train_dataset: Dataset[object] | None = None) -> Sampler[int] | None:
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or self.args.world_size > 1:
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroups([len(ids) for ids in dataset["input_ids"]], size, self.args.seed)

    def compute_loss(self, model: nn.Module, inputs: Inputs, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Any]:
        return super().compute_loss(model, answers_only(self.accelerator.unwrap_model(model), inputs), *args, **kwargs)


class Schedule(TrainerCallback):
    """Tells methods that change with the steps (rank budgets) which step was taken, before gradients are cleared."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: object = None, **_: object
    ) -> None:
        update = getattr(model, "update_and_allocate", None)
        if update is not None:
            update(state.global_step)


class Teller(TrainerCallback):
    """Tells steps, and with what the Trainer logs the memory and the time that is left."""

    def __init__(self, on_event: OnEvent) -> None:
        self.on_event = on_event
        self.started, self.first = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.started, self.first = time.monotonic(), state.global_step
        self.on_event(Step(state.global_step, state.max_steps))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.on_event(Step(state.global_step, state.max_steps))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        pace = (time.monotonic() - self.started) / max(1, state.global_step - self.first)
        left = pace * (state.max_steps - state.global_step)
        self.on_event(Logged(state.global_step, state.max_steps, dict(logs or {}), memory(), left))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.on_event(TrainingEnded())


def answers_only(model: nn.Module, inputs: Inputs) -> Inputs:
    """Asks the model for the logits from the first label on: a small model spends a fifth of its time on its head.

    Left as it is where soft prompts lengthen the labels, which must then stay whole.
    """
    ids, labels = inputs.get("input_ids"), inputs.get("labels")
    if ids is None or labels is None or ids.shape != labels.shape or not takes(model, "logits_to_keep"):
        return inputs
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        return inputs
    first = int((labels != -100).any(0).int().argmax())
    keep = ids.shape[1] - max(0, first - 1)
    return inputs | {"labels": labels[:, -keep:], "logits_to_keep": keep}


def trainer(
    model: Model,
    args: TrainingArguments,
    rows: Rows,
    held_out: Rows | None,
    collator: DataCollator,
    callbacks: list[TrainerCallback],
) -> AdapterTrainer:
    made = AdapterTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=held_out, data_collator=collator, callbacks=callbacks
    )
    made.remove_callback(PrinterCallback)
    return made


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint. The Trainer writes its state last, so one cut short by a crash has none."""
    found = [p.parent for p in folder.glob("checkpoint-*/trainer_state.json")]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def steps_of(args: TrainingArguments, rows: int) -> int:
    """How many optimizer steps the Trainer will take."""
    if args.max_steps > 0:
        return args.max_steps
    per_step = args.train_batch_size * args.world_size
    batches = rows // per_step if args.dataloader_drop_last else -(-rows // per_step)
    per_epoch = max(1, -(-batches // args.gradient_accumulation_steps))
    return max(1, int(-(-args.num_train_epochs * per_epoch // 1)))
