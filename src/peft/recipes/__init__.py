"""Fine-tuning as a library: a job is read, run and recorded. It returns values and tells events; it prints nothing.

A part (`recipes.run`, `recipes.saved`, ...) is imported when it is first asked for, so that naming this package costs
nothing: most parts load torch and transformers.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import (
        bases,
        checks,
        data,
        events,
        files,
        job,
        likelihood,
        outputs,
        ranks,
        record,
        resuming,
        run,
        saved,
        stopping,
        writing,
    )

PARTS = (
    "bases",
    "checks",
    "data",
    "events",
    "files",
    "job",
    "likelihood",
    "outputs",
    "ranks",
    "record",
    "resuming",
    "run",
    "saved",
    "stopping",
    "tasks",
    "trainers",
    "writing",
)


def __getattr__(name: str) -> ModuleType:
    if name in PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
