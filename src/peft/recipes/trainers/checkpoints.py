"""What a run goes on from: exact, whole, and never more than a few minutes old.

Beside what transformers saves, a checkpoint holds the trained parameters as they are in memory (a file for others may hold
less: pruned parts, a prompt without the network behind it), what scheduled methods know, and the sums behind the logged
losses. So a run that was killed and goes on gives the numbers of one that was not.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...contract.capabilities import Scheduled
from ...contract.method import Method
from ...errors import UserError
from ..outputs import Output
from ..stopping import Stopper

FOLDER, EXACT, STATE = "checkpoints", "exact.pt", "trainer_state.json"
NAME = re.compile(r"checkpoint-(\d+)")


def step_of(name: str) -> int | None:
    """The step that a checkpoint's folder name says."""
    found = NAME.fullmatch(name)
    return int(found[1]) if found else None


def last(output: Output) -> Path | None:
    """The newest checkpoint that is whole, byte for byte."""
    folder = output.path(FOLDER)
    if not folder.is_dir() or folder.is_symlink():
        return None
    steps = sorted(((step_of(p.name), p) for p in folder.iterdir() if step_of(p.name) is not None), reverse=True)
    for step, path in steps:
        name = f"{FOLDER}/{path.name}"
        if output.is_whole(name) or (output.adopted and not output.listed(name) and _was_finished(path, step)):
            return path
    return None


def _was_finished(path: Path, step: int | None) -> bool:
    """Whether a checkpoint of a version that listed nothing is complete: transformers writes the state last."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and state.get("global_step") == step


def best(output: Output, state: TrainerState) -> str | None:
    """The best checkpoint by its step, whatever the run's folder was called when it was written."""
    step = getattr(state, "best_global_step", None)
    found = output.path(f"{FOLDER}/checkpoint-{step}")
    return str(found) if step and found.is_dir() else None


def outdated(output: Output, limit: int | None, wanted: str | None) -> list[str]:
    """The checkpoints beyond the newest `limit`, of which the best, if one is wanted, is one."""
    if limit is None or limit < 1:
        return []
    found = {n.split("/")[1] for n in output.listed(FOLDER) if n.count("/") > 1}
    steps = sorted((s, n) for n in found if (s := step_of(n)) is not None)
    kept = {n for _, n in steps[-1:]} | {n for _, n in steps if wanted is not None and n == Path(wanted).name}
    for _, n in reversed(steps):
        if len(kept) < limit:
            kept.add(n)
    return [f"{FOLDER}/{n}" for _, n in steps if n not in kept]


# -- the state in memory ------------------------------------------------------------------------------------------------
class Heard:
    """The sums behind the logged losses. transformers forgets them where a run is interrupted."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None  # of the losses since the last log
        self.total, self.logged_at = 0.0, 0  # what was logged so far, and the step of the last log

    def add(self, loss: Tensor, step: int, *, filtered: bool) -> None:
        """One more loss; `filtered`: an infinite one counts as the mean of those before it."""
        now = torch.zeros_like(loss) if self.sum is None else self.sum
        if filtered and not bool(torch.isfinite(loss)):
            self.sum = now + now / (1 + step - self.logged_at)
        else:
            self.sum = now + loss

    def mean(self, step: int) -> float:
        """The mean loss of the steps since the last log, which this is."""
        value = float(self.sum) if self.sum is not None else 0.0
        mean = value / max(1, step - self.logged_at)
        self.total, self.logged_at, self.sum = self.total + value, step, None
        return mean

    def overall(self, step: int) -> float:
        """The mean loss of all steps."""
        return (self.total + (float(self.sum) if self.sum is not None else 0.0)) / max(1, step)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that training has changed in a model with adapters, as tensors and plain values."""
    return {
        "parameters": {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad},
        "buffers": {n: b.detach().cpu() for n, b in _moving(model).items()},
        "progress": {n: m.progress() for n, m in _scheduled(model)},
        "patterns": {n: getattr(c, "rank_pattern", None) for n, c in getattr(model, "peft_config", {}).items()},
    }


@torch.no_grad()
def restore(model: nn.Module, found: Mapping[str, Any], where: Path) -> None:
    """Put the values of `snapshot` into a model with a fresh adapter of the same job."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad} | _moving(model)
    held: dict[str, Tensor] = found["parameters"] | found["buffers"]
    wrong = [n for n in {*own, *held} if n not in own or n not in held or own[n].shape != held[n].shape]
    if wrong:
        raise UserError(
            f"The checkpoint {where} does not fit the model that the job describes: {sorted(wrong)[0]} differs. Was it "
            "written by another version? --restart begins anew."
        )
    for name, p in own.items():
        p.copy_(held[name])
    for name, m in _scheduled(model):
        m.take_up(found["progress"][name])
    for name, config in getattr(model, "peft_config", {}).items():
        if found["patterns"].get(name) is not None:
            config.rank_pattern = found["patterns"][name]


def _moving(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that training moves: statistics of batches, in the base and in copies of its modules."""
    return {
        f"{path}.{n}": b
        for path, m in model.named_modules()
        if isinstance(m, (nn.modules.batchnorm._NormBase, Method))
        for n, b in m.named_buffers()
        if n.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
    }


def _scheduled(model: nn.Module) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, Scheduled)]


# -- when ---------------------------------------------------------------------------------------------------------------
class Keeper(TrainerCallback):
    """Saves where transformers does, every few minutes, and after the last step; each time with all of that step's work.

    What transformers does at an epoch's end (scores, logs) comes after the step; a checkpoint in between would lack it.
    """

    def __init__(self, seconds: float, stopper: Stopper, output: Output) -> None:
        self.seconds, self.stopper, self.output = seconds, stopper, output
        self.saved, self.deferred = time.monotonic(), False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.saved = time.monotonic()
        if state.best_model_checkpoint is None:
            state.best_model_checkpoint = best(self.output, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        ends = state.global_step >= state.max_steps
        if ends or self._due(args):
            control.should_save = True
        self.deferred = control.should_save and (ends or _whole_epoch(state))
        if self.deferred:
            control.should_save = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.stopper.stopped and not _whole_epoch(state):  # it is not over, transformers only leaves its loop
            control.should_save = control.should_evaluate = control.should_log = False
        elif self.deferred:
            control.should_save = True
        self.deferred = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.saved = time.monotonic()

    def _due(self, args: TrainingArguments) -> bool:
        due = time.monotonic() - self.saved >= self.seconds
        if args.world_size > 1:  # clocks differ, and all processes must save or none
            agreed = torch.tensor([int(due)], device=args.device)
            torch.distributed.broadcast(agreed, 0)
            due = bool(agreed.item())
        return due


def _whole_epoch(state: TrainerState) -> bool:
    return state.epoch is not None and float(state.epoch).is_integer()
