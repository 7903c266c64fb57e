"""One run of a job, step by step: read, plan, score the base, train or go on, save, score, record."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch import nn

import peft

from ..config import Fields
from ..errors import UserError
from . import bases, data, ranks, record, resuming, saved
from .bases import Model
from .data import Rows
from .events import (
    Adopted,
    Answered,
    BaseScored,
    Counted,
    Finished,
    GoingOn,
    Metrics,
    OnEvent,
    Plan,
    RowsRead,
    Shared,
    Stopped,
    Target,
    ignore,
    working,
)
from .job import Job, check_fields, check_job
from .outputs import Output
from .stopping import Stopper, memory
from .tasks import find
from .trainers import checkpoints, supervised
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
    "save_only_model": "`keep_checkpoints`",
}
COMMAND = "peft train"
RESULTS = (saved.ADAPTER, saved.METRICS, saved.PLOT)
FILES = (*RESULTS, *(f"{saved.ADAPTER}/{n}" for n in ("adapter_config.json", "adapter_model.safetensors")))
BEFORE = f"{checkpoints.FOLDER}/before.json"  # the base's scores, for a run that goes on


class Run:
    """A job with everything that it names found and checked."""

    def __init__(self, job: Job, on_event: OnEvent = ignore) -> None:
        import transformers

        on_event = on_event if ranks.is_first() else ignore
        self.job, self.output, self.on_event = job, Path(job.output).expanduser(), on_event
        check_fields(job.trainer, transformers.TrainingArguments, "trainer", reserved=RESERVED)
        check_job(job)
        saved.method(job.method)
        self.arguments = self._arguments()  # here the processes of a run meet
        self.sharded = supervised.sharded(self.arguments)
        self.before: dict[str, float] | None = None  # the base's scores
        with ranks.agreed():
            self._read()

    def _read(self) -> None:
        job, on_event = self.job, self.on_event
        self.source = bases.resolve(job.model)
        self.kind = find.find(job.task, bases.load_config(self.source), self.source.gguf is not None)
        job.task = find.SHORT[self.kind.type]
        self.read = data.digests(job.data) | bases.digests(self.source)  # what a run that goes on must find unchanged
        self.train_rows, self.held_out = data.load(job.data, job.seed, self.kind, on_event)
        on_event(RowsRead(len(self.train_rows), len(self.held_out) if self.held_out else None))
        self.tokenizer = bases.load_tokenizer(self.source)
        self.task = self.kind(job.data, self.tokenizer, job.data.choices, on_event)
        self.task.encode(self.train_rows[0])  # says early what a row lacks
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
            usual["use_cpu"] = ranks.count() > 1  # accelerate does not find the way for processes to talk by itself
        given = usual | DEFAULTS | self.job.trainer
        folder = str(self.output.absolute() / checkpoints.FOLDER)
        return transformers.TrainingArguments(**given, output_dir=folder, seed=self.job.seed, disable_tqdm=True)

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
        started = time.monotonic()
        output = Output(self.output, COMMAND, writes=ranks.is_first(), foreign=saved.is_old_run)
        with ranks.agreed():
            if output.writes:
                output.__enter__()
        with contextlib.closing(output):
            output.staging = ranks.on_first(lambda: output.staging)  # all write their part of a checkpoint there
            return self._train(output, restart, stop_after, started)

    def _train(self, output: Output, restart: bool, stop_after: int | None, started: float) -> Finished | Stopped:
        import transformers

        untidied = not restart and output.notes.get("state") == "saved"
        if metrics := ranks.on_first(lambda: self._known(output, saved.METRICS) if untidied else None):
            return self._tidied(output, metrics)
        checkpoint = ranks.on_first(lambda: self._begin(output, restart))
        transformers.set_seed(self.job.seed)
        with working("loading the base model", self.on_event), ranks.agreed(alone=not self.sharded):
            base = bases.load_base(self.source, self.kind.auto, self.job.dtype, **self.task.model_arguments())
        self.on_event(self._plan(base))
        if ranks.together():
            args = self.arguments
            self.on_event(Shared(args.world_size, args.train_batch_size, args.gradient_accumulation_steps))
        if self.held_out and self.job.evaluate_before:
            self.before = ranks.on_first(lambda: self._known(output, BEFORE))
            if self.before is None and not self.sharded:
                self._score_base(output, base)
        transformers.set_seed(self.job.seed)
        model = peft.get_peft_model(base, self.config)
        # what the adapter's config tells others to load: as the job names it, a folder by its full path
        local = Path(self.job.model).expanduser()
        for config in model.peft_config.values():
            config.base_model_name_or_path = str(local.resolve()) if local.exists() else self.job.model
        counts = record.counts(peft.counts(model))

        if "logging_steps" not in self.job.trainer:
            self.arguments.logging_steps = max(1, self.steps // 25)
        with ranks.agreed():
            encoded, held_out = self._encoded(self.train_rows), None
            if self.held_out and self.arguments.eval_strategy != "no":
                held_out = self._encoded(self.held_out)
        stopper = Stopper(stop_after, self.on_event)
        keeper = checkpoints.Keeper(60 * self.job.checkpoint_minutes, stopper, output)
        hooks = [supervised.Teller(self.on_event), supervised.Schedule(), stopper, keeper]
        collator = self.task.collator()
        loop = supervised.trainer(model, self.arguments, encoded, held_out, collator, hooks, output, started)
        if self.before is None and self.held_out and self.job.evaluate_before:  # only now the base can be run

            def score_base() -> None:
                with model.disable_adapter():
                    self._score_base(output, loop.whole)

            loop.add_callback(supervised.AtTheBeginning(score_base))
        if checkpoint is not None and (checkpoints.step_of(Path(checkpoint).name) or 0) >= self.steps:
            loop.take_up_the_end(checkpoint)
        else:
            with stopper:
                loop.train(resume_from_checkpoint=checkpoint)
        if stopper.stopped:
            stopped = Stopped(loop.state.global_step, loop.state.max_steps, stopper.asked)
            self.on_event(stopped)
            return stopped
        return self._finish(output, model, loop, counts)

    def _begin(self, output: Output, restart: bool) -> str | None:
        """Prepares the output folder; the checkpoint to go on from, if a run was interrupted there."""
        if restart and output.adopted:
            raise UserError(
                f"{self.output} holds a run of a version that kept no list of what it wrote, so nothing there is removed. "
                "Empty the folder yourself, or give another --output."
            )
        made = resuming.written_job(output)
        if restart:
            output.refuse_what_is_in_the_way(*FILES, checkpoints.FOLDER)
            resuming.check_record(self.job, output, made)
            output.remove(*RESULTS, checkpoints.FOLDER, saved.JOB)
            output.notes = {}
        elif output.path(saved.METRICS).exists() and (output.adopted or output.listed(saved.METRICS)):
            raise UserError(
                f"{self.output} holds a finished run. Give another --output, or --restart to train it anew."
            )
        output.refuse_what_is_in_the_way(*FILES)
        checkpoint = checkpoints.last(output)
        if checkpoint is not None or output.adopted:
            resuming.check_same(self.job, self.read, output, made)
        else:
            resuming.check_record(self.job, output, made)
        if output.adopted:
            self.on_event(Adopted(self.output))
        if checkpoint is not None:
            self.on_event(GoingOn(checkpoints.step_of(checkpoint.name) or 0, self.steps))
        text = yaml.safe_dump(self.job.located(), sort_keys=False, allow_unicode=True)
        known, now = (output.notes.get("job"), output.notes.get("read")), (text, self.read)
        output.begin(job=text, read=self.read, adopted=output.adopted, state="begun", processes=ranks.count())
        if checkpoint is None and known != now:
            output.remove(BEFORE)  # the scores of another job
        if not output.path(saved.JOB).exists() or output.is_own(saved.JOB):
            output.write(saved.JOB, text)
        output.keep_folder(checkpoints.FOLDER)
        return str(checkpoint) if checkpoint is not None else None

    def _known(self, output: Output, name: str) -> Any:
        """What a JSON file says that an interrupted run has written; None where it has not."""
        if output.is_own(name) or (name == BEFORE and output.adopted and output.path(name).is_file()):
            return json.loads(output.path(name).read_text(encoding="utf-8"))
        return None

    def _score_base(self, output: Output, base: Model) -> None:
        self.before = self._scored(base)
        with ranks.agreed():
            output.write(BEFORE, record.as_json(self.before))
        self.on_event(BaseScored(self.before))

    def _scored(self, model: Model) -> dict[str, float]:
        """The scores on the held-out rows: each process reads its share, or all the same where weights are sharded."""
        assert self.held_out is not None
        size = self.arguments.per_device_eval_batch_size
        if self.sharded or not ranks.together():
            return self.task.evaluate(model, self.held_out, size)
        mine = range(ranks.rank(), len(self.held_out), ranks.count())
        with ranks.agreed():
            found = self.task.evaluate(model, self.held_out.select(mine), size) if mine else None
        return ranks.pooled(found)

    def _encoded(self, rows: Rows) -> Rows:
        # the fingerprint keeps datasets from pickling the tokenizer to look for a cached result
        return rows.map(self.task.encode, remove_columns=rows.column_names, new_fingerprint=uuid.uuid4().hex)

    def _finish(
        self,
        output: Output,
        model: PeftModel,
        loop: AdapterTrainer,
        counts: Counted,
    ) -> Finished:
        folder = output.path(saved.ADAPTER)
        with ranks.agreed(), output.written(saved.ADAPTER) as part:
            model.save_pretrained(str(part), is_main_process=output.writes)
        trained = loop.seconds
        after = self._scored(loop.whole if self.sharded else model) if self.held_out else None
        history = loop.state.log_history
        if output.writes:
            with output.written(saved.PLOT) as part:
                record.plot(history, part, f"{self.job.method} on {self.job.model}", self.on_event)
        losses = [row["loss"] for row in history if "loss" in row]
        metrics: Metrics = {
            "job": self.job.located(),
            "counts": counts,
            "adapter_bytes": record.folder_size(folder),
            "before": self.before,
            "after": after,
            "steps": loop.state.global_step,
            "processes": ranks.count(),
            "rows_of_a_step": supervised.rows_of_a_step(self.arguments),
            "final_loss": losses[-1] if losses else None,
            "seconds": {"total": loop.seconds, "until_saved": trained},
            "memory_bytes": memory(),
            "history": history,
            "versions": record.versions(),
        }
        output.notes["state"] = "saved"
        with ranks.agreed():
            output.write(saved.METRICS, record.as_json(metrics))
        finished = self._tidied(output, metrics)
        self._show(model)
        return finished

    def _tidied(self, output: Output, metrics: Metrics) -> Finished:
        """The end of a run whose results are written: its checkpoints go."""
        if not self.job.keep_checkpoints:
            output.remove(checkpoints.FOLDER)
        output.begin(state="finished")
        adapter, plot, metrics_file = (self.output / n for n in (saved.ADAPTER, saved.PLOT, saved.METRICS))
        finished = Finished(metrics, adapter, metrics_file, plot if output.listed(saved.PLOT) else None)
        self.on_event(finished)
        return finished

    def _show(self, model: PeftModel) -> None:
        """Tells what the adapted model answers to a few held-out rows."""
        if not self.held_out or self.job.show <= 0 or self.sharded or not ranks.is_first():
            return
        count = min(self.job.show, len(self.held_out))
        rows = self.held_out.select(range(count))
        if self.task.generates:
            asked = [self.task.prompt(row) for row in rows]
            answers = self.task.generate(model, asked)
        else:
            asked = [self.task.shown(row) for row in rows]
            answers = [str(found["prediction"]) for found in self.task.predict(model, rows, count)]
        self.on_event(Answered(tuple(zip(asked, answers))))
