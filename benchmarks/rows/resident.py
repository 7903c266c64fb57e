"""What 100 resident adapters hold beyond their weights: bytes of Python objects, per adapter and site."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

from torch import Tensor

from ..case import Case, Figure, at_most
from ..models import lora, randomise, tokens, with_effect
from .add100 import crowd, small

TITLE = "100 resident adapters: Python objects"


class Resident(Case):
    name = "r=8, 112 targets"
    rounds = 1

    def __init__(self, quick: bool) -> None:
        self.n = 5 if quick else 100
        self.figures = {
            "bytes": Figure("B", (at_most(4096),), "of Python objects per adapter and site, beyond the weights"),
            "objects": Figure("", what="blocks per adapter and site"),
            "modules": Figure("", what="modules per adapter and site"),
        }

    def build(self, folder: Path) -> None:
        self.model, _ = crowd(small(self.quick), 2)
        self.sites = 7 * (1 if self.quick else 16)
        self.next = 2

    def outputs(self) -> dict[str, Tensor]:
        randomise(self.model, "a1")
        self.model.set_adapter("a1")
        return with_effect(self.model, logits=lambda: self.model(input_ids=tokens(1, 16, 256)).logits)

    def sample(self) -> dict[str, float]:
        made = self.n if self.next == 2 else 5
        gc.collect()
        modules = sum(1 for _ in self.model.modules())
        tracemalloc.start()
        try:
            self.model.add_adapter(f"warm{self.next}", lora(8))
            gc.collect()
            before = tracemalloc.take_snapshot()
            start = tracemalloc.get_traced_memory()[0]
            first = sum(t.count for t in before.statistics("filename"))
            for k in range(self.next, self.next + made):
                self.model.add_adapter(f"a{k}", lora(8))
            gc.collect()
            held = tracemalloc.get_traced_memory()[0] - start
            blocks = sum(t.count for t in tracemalloc.take_snapshot().statistics("filename")) - first
        finally:
            tracemalloc.stop()
        self.next += made
        per = made * self.sites
        grown = sum(1 for _ in self.model.modules()) - modules
        return {"bytes": held / per, "objects": blocks / per, "modules": grown / (made + 1) / self.sites}


def cases(quick: bool) -> list[Case]:
    return [Resident(quick)]
