"""Bytes alive between forward and backward ÷ those of the frozen model; the same four cases as the train step."""

from __future__ import annotations

from torch import Tensor

from ..case import Case, Figure, at_most
from ..measure import live_bytes, saved_bytes
from ..models import step_outputs
from .step import GOALS, Step

TITLE = "Bytes saved for backward ÷ frozen floor"


class Saved(Step):
    rounds = 1

    def __init__(self, name: str, quick: bool) -> None:
        super().__init__(name, quick)
        self.figures = {
            "live": Figure("×", (at_most(1.33),), "all the allocator handed out and did not get back"),
            "hooks": Figure("×", what="what saved-tensor hooks see"),
            "live MB": Figure("MB"),
        }

    def outputs(self) -> dict[str, Tensor]:
        return step_outputs(self.model, self.ids[:1, :64])

    def sample(self) -> dict[str, float]:
        def forward(model):
            return lambda: model(input_ids=self.ids, labels=self.ids).loss

        for model in (self.floor, self.model):
            forward(model)().backward()
        live, least = live_bytes(forward(self.model)), live_bytes(forward(self.floor))
        hooks = saved_bytes(forward(self.model)) / saved_bytes(forward(self.floor))
        return {"live": live / least, "hooks": hooks, "live MB": live / 2**20}


def cases(quick: bool) -> list[Case]:
    return [Saved(name, quick) for name in GOALS]
