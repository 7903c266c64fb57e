"""What a config would adapt, without doing it."""

from __future__ import annotations

import copy

from torch import nn

from ...config import PeftConfig
from ...errors import NoMatchingPeftModuleError
from ..acting.on_model import roster_of
from .plan import Item, Plan, plan


class DryRun(list[Item]):
    """The rows of a plan, and what it passes over: path -> why."""

    def __init__(self, found: Plan) -> None:
        super().__init__(found.items)
        self.passed_over = found.passed_over


def dry_run(model: nn.Module, config: PeftConfig) -> DryRun:
    """What `config` would adapt, as rows with .path, .kind, .shape, .parameters; raises what get_peft_model would.

    `.passed_over` of the result: the linear layers that `all-linear` cannot adapt, and why.
    """
    base = getattr(model, "base_model", model)
    base = getattr(base, "model", base) if roster_of(model) is not None and hasattr(base, "model") else model
    rows = DryRun(plan(base, copy.deepcopy(config), name="%dry", init=False, meta=True))
    if not rows:
        raise NoMatchingPeftModuleError("the config targets nothing")
    return rows
