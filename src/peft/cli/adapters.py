"""Methods by name, their configs, and adapters on disk with the run that made them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import peft
from peft import registry

from . import models, text
from .console import UserError, near
from .job import Data, Job, check_fields
from .tasks import Task

ADAPTER, JOB, METRICS, PLOT, CHECKPOINTS = "adapter", "job.yaml", "metrics.json", "loss.png", "checkpoints"


def method(name: str) -> tuple[str, Any]:
    """The method of that name, however it is written: `prefix-tuning`, `PREFIX_TUNING`."""
    known = {plain(n): (n, m) for n, m in registry.methods().items()}
    if plain(name) in known:
        return known[plain(name)]
    raise UserError(
        f"Unknown method {name!r}. {near(name.lower(), map(str.lower, registry.methods()))} `peft methods` lists them all."
    )


def plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def config(job: Job, task: type[Task], steps: int) -> Any:
    """The method's config from the job; a schedule that counts training steps gets their number."""
    _, found = method(job.method)
    cls, fields = found.config_class, dict(job.config)
    check_fields(fields, cls, "config", reserved={"peft_type": "`method`", "task_type": "`task`"})
    if "total_step" in cls.__dataclass_fields__:
        fields.setdefault("total_step", steps)
    return cls(task_type=peft.TaskType(task.type), **fields)


@dataclass
class Saved:
    """An adapter folder, its config, and the job that made it where that is known."""

    folder: Path
    config: dict[str, Any]
    job: Job | None


def open_adapter(path: str) -> Saved:
    """The adapter in a folder: the folder of a run, or that of the adapter itself."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {path!r}. Name the folder that `peft train` wrote, or one with an adapter_config.json."
        )
    if (folder / ADAPTER / "adapter_config.json").is_file():
        folder = folder / ADAPTER
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise UserError(f"{path!r} holds no adapter: expected an adapter_config.json in it or in {path}/{ADAPTER}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    made = folder.parent / JOB
    raw = yaml.safe_load(made.read_text(encoding="utf-8")) if folder.name == ADAPTER and made.is_file() else None
    return Saved(folder, content, Job(**(raw | {"data": Data(**raw["data"])})) if raw else None)


@dataclass
class Loaded:
    model: Any
    task: Task
    source: models.Source


def load(
    saved: Saved,
    *,
    model: str | None = None,
    dtype: str = "auto",
    data: dict[str, Any] | None = None,
    base_only: bool = False,
) -> Loaded:
    """The base with the adapter on it, and the task that it was trained for."""
    spec = model or saved.config.get("base_model_name_or_path") or (saved.job.model if saved.job else None)
    if not spec:
        raise UserError(f"The adapter in {saved.folder} does not name its base model. Give --model.")
    source = models.resolve(spec)
    kind = text.find(saved.config.get("task_type"), models.load_config(source), source.gguf is not None)
    known = saved.job.data if saved.job else Data()
    known = Data(**({**known.__dict__} | {k: v for k, v in (data or {}).items() if v is not None}))
    tokenizer = models.load_tokenizer(source)
    task = kind(known, tokenizer, known.choices)
    if task.labels is None and not task.generates:
        raise UserError(
            "The adapter does not come with its labels. Give them in order: --choice NAME --choice NAME ..."
        )
    base = models.load_base(source, kind.auto, dtype, **task.model_arguments())
    adapted = base if base_only else peft.PeftModel.from_pretrained(base, str(saved.folder))
    return Loaded(adapted.eval(), task, source)
