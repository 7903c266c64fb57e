"""transformers' Trainer with three changes: batches, losses and states that resume exactly, checkpoints that are whole or
not there, and logits only where the loss reads them.

Its callbacks tell the run's events and keep methods informed that change with the steps.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.data.data_collator import DataCollator
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.utils import strtobool

from .. import ranks
from ..bases import Model
from ..data import Rows
from ..events import Logged, OnEvent, Step, TrainingEnded
from ..likelihood import takes
from ..outputs import Output
from ..stopping import memory
from . import checkpoints

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
    """The Trainer of `peft train`. It writes checkpoints into `output`, of which it keeps `limit`."""

    def __init__(self, output: Output, limit: int | None, started: float, **given: Any) -> None:
        super().__init__(**given)
        self.output, self.limit = output, limit
        self.heard = checkpoints.Heard()
        self.started, self.earlier = started, 0.0  # seconds that the run took before it was interrupted

    @property
    def seconds(self) -> float:
        """What the run has taken so far, without the time in which it was interrupted."""
        return self.earlier + time.monotonic() - self.started

    @property
    def whole(self) -> Model:
        """The model as it is to be called: by what wraps it, which knows where the pieces of its weights are."""
        found: Any = self.model_wrapped
        return found

    def _get_train_sampler(self, train_dataset: Dataset[object] | None = None) -> Sampler[int] | None:
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        size = rows_of_a_step(self.args)  # dealt out to the processes batch by batch
        return LengthGroups([len(ids) for ids in dataset["input_ids"]], size, self.args.seed)

    def compute_loss(self, model: nn.Module, inputs: Inputs, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Any]:
        return super().compute_loss(model, answers_only(self.accelerator.unwrap_model(model), inputs), *args, **kwargs)

    # -- losses -------------------------------------------------------------------------------------------------------
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.heard.add(loss, self.state.global_step, filtered=self.args.logging_nan_inf_filter)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:
            self.heard.sum = ranks.mean(self.heard.sum)
        if "loss" in logs:
            logs["loss"] = self.heard.mean(self.state.global_step)
        if "train_loss" in logs:
            logs["train_loss"] = self.heard.overall(self.state.global_step)
        super().log(logs, start_time)

    # -- checkpoints --------------------------------------------------------------------------------------------------
    def _save_checkpoint(self, model: nn.Module, trial: Any, **more: Any) -> None:
        """As transformers does it, but aside: the checkpoint takes its place when all of it is on the disk."""
        name = f"checkpoint-{self.state.global_step}"
        parts, place = self.output.staging / "parts", self.output.path(f"{checkpoints.FOLDER}/{name}")
        kept, push = self.args.output_dir, self.args.push_to_hub
        self.args.output_dir, self.args.push_to_hub = str(parts), False
        try:
            super()._save_checkpoint(model, trial, **more)
            if (self.state.best_model_checkpoint or "").startswith(str(parts)):
                self.state.best_model_checkpoint = str(place)
                if self.args.should_save:
                    self.state.save_to_json(str(parts / name / checkpoints.STATE))
            self.heard.sum = ranks.mean(self.heard.sum)
            with ranks.agreed():  # all have written their part
                if self.args.should_save:
                    self._save_exactly(parts / name)
            with ranks.agreed():
                if self.args.should_save:
                    self.output.publish(parts / name, f"{checkpoints.FOLDER}/{name}")
                    best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
                    self.output.remove(*checkpoints.outdated(self.output, self.limit, best))
        finally:
            self.args.output_dir, self.args.push_to_hub = kept, push
            if self.args.should_save:
                shutil.rmtree(parts, ignore_errors=True)
        if push:
            self._push_from_checkpoint(str(place))

    def _save_exactly(self, folder: Path) -> None:
        heard = {"sum": self.heard.sum, "total": self.heard.total, "logged_at": self.heard.logged_at}
        state = {"heard": heard, "seconds": self.seconds}
        if not sharded(self.args):
            state |= checkpoints.snapshot(self.accelerator.unwrap_model(self.model))
        torch.save(state, folder / checkpoints.EXACT)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        exact = Path(resume_from_checkpoint) / checkpoints.EXACT
        found = torch.load(exact, map_location="cpu", weights_only=True) if exact.is_file() else {}
        if "heard" in found:
            heard = found["heard"]
            self.heard.sum = None if heard["sum"] is None else heard["sum"].to(self.args.device)
            self.heard.total, self.heard.logged_at = heard["total"], heard["logged_at"]
            self.earlier = found["seconds"]
        if "parameters" in found:
            checkpoints.restore(self.accelerator.unwrap_model(model or self.model), found, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def take_up_the_end(self, checkpoint: str) -> None:
        """Be as after the training that reached its last step at `checkpoint`; nothing is trained again."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / checkpoints.STATE))
        steps, seconds = self.state.global_step, self.seconds
        rows = steps * rows_of_a_step(self.args)
        numbers = {
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(rows / seconds, 3),
            "train_steps_per_second": round(steps / seconds, 3),
            "total_flos": self.state.total_flos,
            "train_loss": self.heard.overall(steps),
        }
        self.log(numbers)
        best = checkpoints.best(self.output, self.state)
        if self.args.load_best_model_at_end and best is not None:
            self.state.best_model_checkpoint = best
            self._load_best_model()


class AtTheBeginning(TrainerCallback):
    """Does something once the model is where it trains: sharded, say, and before the first step."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.work()


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
    output: Output,
    started: float,
) -> AdapterTrainer:
    """The loop. `started`: when the run began, in seconds of `time.monotonic`."""
    limit, args.save_total_limit = args.save_total_limit, None  # transformers would delete whatever is called so
    made = AdapterTrainer(
        output,
        limit,
        started,
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=collator,
        callbacks=callbacks,
    )
    made.remove_callback(PrinterCallback)
    return made


def sharded(args: TrainingArguments) -> bool:
    """Whether the weights are split over the processes, so that each forward needs all of them."""
    asked = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return bool(args.deepspeed or args.fsdp) or any(strtobool(os.environ.get(n, "false")) for n in asked)


def rows_of_a_step(args: TrainingArguments) -> int:
    """How many rows an optimizer step sees, in all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def steps_of(args: TrainingArguments, rows: int) -> int:
    """How many optimizer steps the Trainer will take."""
    if args.max_steps > 0:
        return args.max_steps
    per_step = args.train_batch_size * args.world_size
    batches = rows // per_step if args.dataloader_drop_last else -(-rows // per_step)
    per_epoch = max(1, -(-batches // args.gradient_accumulation_steps))
    return max(1, int(-(-args.num_train_epochs * per_epoch // 1)))
