"""Switching among 100 adapters, and the forward after it ÷ one that nothing was switched before."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor

from ..case import Case, Figure, at_most
from ..measure import Turns, python_calls
from ..models import randomise, tokens, with_effect
from .add100 import crowd, small

TITLE = "Switch among 100 adapters"


class Switch(Case):
    name = "r=8, 112 targets"

    def __init__(self, quick: bool) -> None:
        self.n = 5 if quick else 100
        self.figures = {
            "set_adapter": Figure("ms", (at_most(0.15),), "one after the other; the adapter trains from then on"),
            "set_adapter, inference": Figure("ms", (at_most(0.15),), "the same with inference_mode=True"),
            "after a forward": Figure("ms", what="with nothing of the adapters in the caches"),
            "after a forward, inference": Figure("ms", what="the same with inference_mode=True"),
            "forward after": Figure("×", (at_most(1.05),), "÷ the same forward without a switch before it"),
            "calls": Figure("calls", what="Python functions entered by set_adapter"),
            "calls, inference": Figure("calls", what="with inference_mode=True"),
        }

    def build(self, folder: Path) -> None:
        self.model, _ = crowd(small(self.quick), self.n)
        for k in (0, 1, self.n - 1):
            randomise(self.model, f"a{k}", salt=str(k))
        self.ids = tokens(1, 8, 256)
        self.names = itertools.cycle([f"a{k}" for k in range(self.n)])

    def switch(self, inference: bool) -> None:
        self.model.set_adapter(next(self.names), inference_mode=inference)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids=self.ids).logits

    def outputs(self) -> dict[str, Tensor]:
        found = {}
        for k in (0, self.n - 1, 1):
            self.model.set_adapter(f"a{k}")
            found |= with_effect(self.model, **{f"adapter {k}": self.forward})
        return found

    def sample(self) -> dict[str, float]:
        n = 5 if self.quick else 20
        out = {}
        for suffix, inference in (("", False), (", inference", True)):
            alone = Turns(5 * n, switch=lambda i=inference: self.switch(i))
            out["set_adapter" + suffix] = 1e3 * alone.median("switch")
            turns = Turns(n, switch=lambda i=inference: self.switch(i), after=self.forward, plain=self.forward)
            out["after a forward" + suffix] = 1e3 * turns.median("switch")
            out.setdefault("forward after", turns.ratio("after", "plain"))
            out["calls" + suffix] = python_calls(lambda i=inference: self.switch(i))
        return out


def cases(quick: bool) -> list[Case]:
    return [Switch(quick)]
