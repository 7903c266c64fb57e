"""One run of a job, step by step: read, plan, score the base, train or go on, save, score, record."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from torch import nn

import peft

from ..config import Fields
from ..errors import UserError
from . import bases, data, record, saved
from .bases import Model
from .data import Rows
from .events import (
    Answered,
    BaseScored,
    Counted,
    Finished,
    GoingOn,
    Metrics,
    OnEvent,
    Plan,
    RowsRead,
    Stopped,
    Target,
    ignore,
    working,
)
from .job import Job, check_fields
from .stopping import Stopper, memory
from .tasks import find
from .trainers import supervised
from .trainers.supervised import AdapterTrainer

if TYPE_CHECKING:
    import transformers

    from ..core.model.peft_model import PeftModel

# What the Trainer gets unless the job says otherwise.
DEFAULTS: Fields = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 3,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.05,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "train_sampling_strategy": "group_by_length",
}
RESERVED = {
    "output_dir": "`output`",
    "seed": "`seed`",
    "resume_from_checkpoint": "the same command again",
    "disable_tqdm": "no flag",
}


class Run:
    """A job with everything that it names found and checked."""

    def __init__(self, job: Job, on_event: OnEvent = ignore) -> None:
        import transformers

        self.job, self.output, self.on_event = job, Path(job.output), on_event
        check_fields(job.trainer, transformers.TrainingArguments, "trainer", reserved=RESERVED)
        saved.method(job.method)
        self.source = bases.resolve(job.model)
        self.kind = find.find(job.task, bases.load_config(self.source), self.source.gguf is not None)
        job.task = find.SHORT[self.kind.type]
        self.train_rows, self.held_out = data.load(job.data, job.seed)
        on_event(RowsRead(len(self.train_rows), len(self.held_out) if self.held_out else None))
        job.data.choices = self.kind.find_labels(job.data, self.train_rows)
        self.tokenizer = bases.load_tokenizer(self.source)
        self.task = self.kind(job.data, self.tokenizer, job.data.choices, on_event)
        self.task.encode(self.train_rows[0])  # says early what a row lacks
        self.arguments = self._arguments()
        self.steps = supervised.steps_of(self.arguments, len(self.train_rows))
        self.config = saved.config(job, self.kind, self.steps)

    def _arguments(self) -> transformers.TrainingArguments:
        import transformers

        usual: Fields = {
            "logging_steps": 1,
            "report_to": "none",
            "remove_unused_columns": False,
            "label_names": ["labels"],
        }
        if bases.device().type == "cpu":
            usual["dataloader_pin_memory"] = False
        given = usual | DEFAULTS | self.job.trainer
        checkpoints = str(self.output / saved.CHECKPOINTS)
        return transformers.TrainingArguments(**given, output_dir=checkpoints, seed=self.job.seed, disable_tqdm=True)

    def dry_run(self) -> Plan:
        """What would be adapted; reads the base's config, not its weights."""
        return self._plan(bases.load_base(self.source, self.kind.auto, meta=True, **self.task.model_arguments()))

    def _plan(self, base: nn.Module) -> Plan:
        rows = peft.dry_run(base, self.config)
        targets = tuple(
            Target(
                path=row.path,
                kind=str(getattr(row.kind, "name", row.kind) or ""),
                shape=tuple(row.shape) if row.shape is not None else None,
                parameters=row.parameters,
            )
            for row in rows
        )
        size = sum(p.numel() for p in base.parameters())
        return Plan(self.job.method, self.job.model, str(self.job.task), targets, size, self.steps, rows.passed_over)

    # -- the run ------------------------------------------------------------------------------------------------------
    def train(self, *, restart: bool = False, stop_after: int | None = None) -> Finished | Stopped:
        """Trains to the end, or until it is stopped. The same job goes on where it stopped; `restart` begins anew."""
        import transformers

        started = time.monotonic()
        checkpoint = self._begin(restart)
        transformers.set_seed(self.job.seed)
        with working("loading the base model", self.on_event):
            base = bases.load_base(self.source, self.kind.auto, self.job.dtype, **self.task.model_arguments())
        self.on_event(self._plan(base))
        before = self._before(base)
        transformers.set_seed(self.job.seed)
        model = peft.get_peft_model(base, self.config)
        # what the adapter's config tells others to load: as the job names it, a folder by its full path
        local = Path(self.job.model).expanduser()
        for config in model.peft_config.values():
            config.base_model_name_or_path = str(local.resolve()) if local.exists() else self.job.model
        counts = record.counts(peft.counts(model))

        if "logging_steps" not in self.job.trainer:
            self.arguments.logging_steps = max(1, self.steps // 25)
        encoded, held_out = self._encoded(self.train_rows), None
        if self.held_out and self.arguments.eval_strategy != "no":
            held_out = self._encoded(self.held_out)
        stopper = Stopper(stop_after, self.on_event)
        hooks = [supervised.Teller(self.on_event), supervised.Schedule(), stopper]
        loop = supervised.trainer(model, self.arguments, encoded, held_out, self.task.collator(), hooks)
        with stopper:
            loop.train(resume_from_checkpoint=checkpoint)
        if stopper.stopped:
            stopped = Stopped(loop.state.global_step, loop.state.max_steps, stopper.asked)
            self.on_event(stopped)
            return stopped
        return self._finish(model, loop, before, counts, started)

    def _begin(self, restart: bool) -> str | None:
        """Prepares the output folder; the checkpoint to go on from, if a run was interrupted there."""
        checkpoints, made = self.output / saved.CHECKPOINTS, self.output / saved.JOB
        if restart:
            for name in (saved.ADAPTER, saved.CHECKPOINTS):
                shutil.rmtree(self.output / name, ignore_errors=True)
            for name in (saved.JOB, saved.METRICS, saved.PLOT):
                (self.output / name).unlink(missing_ok=True)
        if (self.output / saved.METRICS).exists():
            raise UserError(
                f"{self.output} holds a finished run. Give another --output, or --restart to train it anew."
            )
        checkpoint = supervised.last_checkpoint(checkpoints)
        if checkpoint is not None:
            other = self.job.differences(yaml.safe_load(made.read_text(encoding="utf-8"))) if made.exists() else []
            if other:
                raise UserError(
                    f"{self.output} holds an interrupted run of another job: it differs in {', '.join(other)}. "
                    "Give the same job to go on, another --output, or --restart to discard it."
                )
            self.on_event(GoingOn(int(checkpoint.name.rpartition("-")[2]), self.steps))
        self.output.mkdir(parents=True, exist_ok=True)
        made.write_text(yaml.safe_dump(self.job.as_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
        return str(checkpoint) if checkpoint is not None else None

    def _before(self, base: Model) -> dict[str, float] | None:
        """The base's scores on the held-out rows; an interrupted run has them already."""
        if not self.held_out or not self.job.evaluate_before:
            return None
        kept = self.output / saved.CHECKPOINTS / "before.json"
        if kept.exists():
            return yaml.safe_load(kept.read_text(encoding="utf-8"))
        found = self.task.evaluate(base, self.held_out, self.arguments.per_device_eval_batch_size)
        record.write(kept, found)
        self.on_event(BaseScored(found))
        return found

    def _encoded(self, rows: Rows) -> Rows:
        # the fingerprint keeps datasets from pickling the tokenizer to look for a cached result
        return rows.map(self.task.encode, remove_columns=rows.column_names, new_fingerprint=uuid.uuid4().hex)

    def _finish(
        self,
        model: PeftModel,
        loop: AdapterTrainer,
        before: Mapping[str, float] | None,
        counts: Counted,
        started: float,
    ) -> Finished:
        folder, plot, metrics_file = (self.output / n for n in (saved.ADAPTER, saved.PLOT, saved.METRICS))
        model.save_pretrained(str(folder))
        trained = time.monotonic() - started
        after = None
        if self.held_out:
            after = self.task.evaluate(model, self.held_out, self.arguments.per_device_eval_batch_size)
        history = loop.state.log_history
        plotted = record.plot(history, plot, f"{self.job.method} on {self.job.model}", self.on_event)
        losses = [row["loss"] for row in history if "loss" in row]
        metrics: Metrics = {
            "job": self.job.as_dict(),
            "counts": counts,
            "adapter_bytes": record.folder_size(folder),
            "before": before,
            "after": after,
            "steps": loop.state.global_step,
            "final_loss": losses[-1] if losses else None,
            "seconds": {"total": time.monotonic() - started, "until_saved": trained},
            "memory_bytes": memory(),
            "history": history,
            "versions": record.versions(),
        }
        record.write(metrics_file, metrics)
        if not self.job.keep_checkpoints:
            shutil.rmtree(self.output / saved.CHECKPOINTS, ignore_errors=True)
        finished = Finished(metrics, folder, metrics_file, plot if plotted else None)
        self.on_event(finished)
        self._show(model)
        return finished

    def _show(self, model: PeftModel) -> None:
        """Tells what the adapted model answers to a few held-out rows."""
        if not self.held_out or self.job.show <= 0:
            return
        count = min(self.job.show, len(self.held_out))
        rows = self.held_out.select(range(count))
        if self.task.generates:
            asked = [self.task.prompt(row) for row in rows]
            answers = self.task.generate(model, asked)
        else:
            asked = [str(row[self.job.data.text]) for row in rows]
            answers = [str(found["prediction"]) for found in self.task.predict(model, rows, count)]
        self.on_event(Answered(tuple(zip(asked, answers))))
