"""One run of `peft train`, step by step: read, plan, score the base, train or go on, save, score, report."""

from __future__ import annotations

import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import typer
import yaml

import peft

from . import adapters, data, models, report, text, training
from .console import UserError, console, escape, facts, folder_size, heading, quiet_libraries, size
from .job import Job, check_fields
from .progress import Reporter, Stopper, memory

# What the Trainer gets unless the job says otherwise.
DEFAULTS: dict[str, Any] = {
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

    def __init__(self, job: Job) -> None:
        import transformers

        quiet_libraries()
        self.job, self.output = job, Path(job.output)
        check_fields(job.trainer, transformers.TrainingArguments, "trainer", reserved=RESERVED)
        adapters.method(job.method)
        self.source = models.resolve(job.model)
        self.kind = text.find(job.task, models.load_config(self.source), self.source.gguf is not None)
        job.task = text.SHORT[self.kind.type]
        self.train_rows, self.held_out = data.load(job.data, job.seed)
        console.print(
            f"{len(self.train_rows)} rows to train on, {len(self.held_out) if self.held_out else 'none'} held out"
        )
        job.data.choices = self.kind.find_labels(job.data, self.train_rows)
        self.tokenizer = models.load_tokenizer(self.source)
        self.task = self.kind(job.data, self.tokenizer, job.data.choices)
        self.task.encode(self.train_rows[0])  # says early what a row lacks
        self.arguments = self._arguments()
        self.steps = training.steps_of(self.arguments, len(self.train_rows))
        self.config = adapters.config(job, self.kind, self.steps)

    def _arguments(self) -> Any:
        import transformers

        given = DEFAULTS | self.job.trainer
        return transformers.TrainingArguments(
            **(
                {"logging_steps": 1, "report_to": "none", "remove_unused_columns": False, "label_names": ["labels"]}
                | given
            ),
            output_dir=str(self.output / adapters.CHECKPOINTS),
            seed=self.job.seed,
            disable_tqdm=True,
            **(
                {}
                if "dataloader_pin_memory" in given or models.device().type != "cpu"
                else {"dataloader_pin_memory": False}
            ),
        )

    def dry_run(self, every: bool = False) -> None:
        """Prints what would be adapted; reads the base's config, not its weights."""
        base = models.load_base(self.source, self.kind.auto, meta=True, **self.task.model_arguments())
        added = report.plan(peft.dry_run(base, self.config), every=every, title=self._title())
        total = sum(p.numel() for p in base.parameters())
        console.print(
            f"{added:,} new parameters beside {total:,} of the base ({100 * added / total:.4f} %), {self.steps} steps"
        )

    def _title(self) -> str:
        return f"What {self.job.method} adapts in {self.job.model} ({self.job.task})"

    # -- the run ------------------------------------------------------------------------------------------------------
    def train(self, *, restart: bool = False, stop_after: int | None = None, every: bool = False) -> None:
        import transformers

        started = time.monotonic()
        checkpoint = self._begin(restart)
        transformers.set_seed(self.job.seed)
        with console.status("loading the base model"):
            base = models.load_base(self.source, self.kind.auto, self.job.dtype, **self.task.model_arguments())
        report.plan(peft.dry_run(base, self.config), every=every, title=self._title())
        before = self._before(base)
        transformers.set_seed(self.job.seed)
        model = peft.get_peft_model(base, self.config)
        # what the adapter's config tells others to load: as the job names it, a folder by its full path
        local = Path(self.job.model).expanduser()
        for config in model.peft_config.values():
            config.base_model_name_or_path = str(local.resolve()) if local.exists() else self.job.model
        counts = report.counts(peft.counts(model))

        if "logging_steps" not in self.job.trainer:
            self.arguments.logging_steps = max(1, self.steps // 25)
        encoded, held_out = self._encoded(self.train_rows), None
        if self.held_out and self.arguments.eval_strategy != "no":
            held_out = self._encoded(self.held_out)
        stopper, hooks = Stopper(stop_after), [Reporter(), training.Schedule()]
        loop = training.trainer(model, self.arguments, encoded, held_out, self.task.collator(), [*hooks, stopper])
        with stopper:
            loop.train(resume_from_checkpoint=checkpoint)
        if stopper.stopped:
            done = f"Stopped after step {loop.state.global_step} of {loop.state.max_steps}."
            console.print(f"{done} The same command goes on from there.")
            raise typer.Exit(130 if stopper.asked else 0)
        self._finish(model, loop, before, counts, started)

    def _begin(self, restart: bool) -> str | None:
        """Prepares the output folder; the checkpoint to go on from, if a run was interrupted there."""
        checkpoints, record = self.output / adapters.CHECKPOINTS, self.output / adapters.JOB
        if restart:
            for name in (adapters.ADAPTER, adapters.CHECKPOINTS):
                shutil.rmtree(self.output / name, ignore_errors=True)
            for name in (adapters.JOB, adapters.METRICS, adapters.PLOT):
                (self.output / name).unlink(missing_ok=True)
        if (self.output / adapters.METRICS).exists():
            raise UserError(
                f"{self.output} holds a finished run. Give another --output, or --restart to train it anew."
            )
        checkpoint = training.last_checkpoint(checkpoints)
        if checkpoint is not None:
            other = self.job.differences(yaml.safe_load(record.read_text(encoding="utf-8"))) if record.exists() else []
            if other:
                raise UserError(
                    f"{self.output} holds an interrupted run of another job: it differs in {', '.join(other)}. "
                    "Give the same job to go on, another --output, or --restart to discard it."
                )
            console.print(f"Going on from step {checkpoint.name.rpartition('-')[2]} of {self.steps}.")
        self.output.mkdir(parents=True, exist_ok=True)
        record.write_text(yaml.safe_dump(self.job.as_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
        return str(checkpoint) if checkpoint is not None else None

    def _before(self, base: Any) -> dict[str, float] | None:
        """The base's scores on the held-out rows; an interrupted run has them already."""
        if not self.held_out or not self.job.evaluate_before:
            return None
        kept = self.output / adapters.CHECKPOINTS / "before.json"
        if kept.exists():
            return yaml.safe_load(kept.read_text(encoding="utf-8"))
        found = self.task.evaluate(base, self.held_out, self.arguments.per_device_eval_batch_size)
        report.write(kept, found)
        console.print("  ".join(f"base {name} {value}" for name, value in report.scores(found, None)))
        return found

    def _encoded(self, rows: Any) -> Any:
        # the fingerprint keeps datasets from pickling the tokenizer to look for a cached result
        return rows.map(self.task.encode, remove_columns=rows.column_names, new_fingerprint=uuid.uuid4().hex)

    def _finish(self, model: Any, loop: Any, before: Any, counts: dict[str, Any], started: float) -> None:
        folder = self.output / adapters.ADAPTER
        model.save_pretrained(str(folder))
        trained = time.monotonic() - started
        after = None
        if self.held_out:
            after = self.task.evaluate(model, self.held_out, self.arguments.per_device_eval_batch_size)
        history = loop.state.log_history
        plotted = report.plot(history, self.output / adapters.PLOT, f"{self.job.method} on {self.job.model}")
        seconds = time.monotonic() - started
        used = memory()
        losses = [row["loss"] for row in history if "loss" in row]
        metrics = {
            "job": self.job.as_dict(),
            "counts": counts,
            "adapter_bytes": folder_size(folder),
            "before": before,
            "after": after,
            "steps": loop.state.global_step,
            "final_loss": losses[-1] if losses else None,
            "seconds": {"total": seconds, "until_saved": trained},
            "memory_bytes": used,
            "history": history,
            "versions": report.versions(),
        }
        report.write(self.output / adapters.METRICS, metrics)
        if not self.job.keep_checkpoints:
            shutil.rmtree(self.output / adapters.CHECKPOINTS, ignore_errors=True)
        rows: list[tuple[str, Any]] = report.count_facts(counts)
        rows += [("adapter", f"{folder} ({size(metrics['adapter_bytes'])})"), *report.scores(before, after)]
        rows += [("peak memory", size(used.get("accelerator_peak", used["peak"]))), ("time", f"{seconds / 60:.1f} min")]
        rows += [
            ("loss plot", self.output / adapters.PLOT if plotted else None),
            ("metrics", self.output / adapters.METRICS),
        ]
        facts(rows, "Done")
        self._show(model)

    def _show(self, model: Any) -> None:
        """A few held-out rows with what the adapted model answers."""
        count = min(self.job.show, len(self.held_out)) if self.held_out else 0
        if count <= 0:
            return
        rows = self.held_out.select(range(count))
        if isinstance(self.task, text.Text):
            answers = self.task.generate(model, [self.task.prompt(row) for row in rows])
        else:
            answers = [found["prediction"] for found in self.task.predict(model, rows, count)]
        heading("Held-out rows, answered")
        for row, answer in zip(rows, answers):
            shown = self.task.prompt(row) if self.task.generates else str(row[self.job.data.text])
            console.print(f"{escape(shown.rstrip())} [green]{escape(str(answer))}[/]", soft_wrap=True)
