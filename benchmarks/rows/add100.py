"""Adding the 100th LoRA adapter (r=8) to a model of Llama shape with 112 targets ÷ adding the first."""

from __future__ import annotations

import copy
import statistics
from pathlib import Path
from typing import Any

from torch import Tensor

from ..case import Case, Figure, at_most
from ..measure import once
from ..models import llama, lora, randomise, tokens, with_effect

TITLE = "Add the 100th adapter ÷ the first"


def crowd(base: Any, n: int) -> tuple[Any, list[float]]:
    """A model with adapters "a0" … "a{n − 1}", and the seconds that each took."""
    from peft import get_peft_model

    made: list[Any] = []
    times = [once(lambda: made.append(get_peft_model(base, lora(8), adapter_name="a0")))]
    times += [once(lambda k=k: made[0].add_adapter(f"a{k}", lora(8))) for k in range(1, n)]
    return made[0], times


def small(quick: bool) -> Any:
    return llama(hidden=64, layers=1 if quick else 16, inner=128, heads=4, vocabulary=256)


class Add(Case):
    name = "r=8, 112 targets"

    def __init__(self, quick: bool) -> None:
        self.n = 5 if quick else 100
        self.figures = {
            "100th ÷ first": Figure("×", (at_most(1.1),)),
            "first": Figure("ms", what="median of six models, three before the crowd and three after"),
            "100th": Figure("ms", what="median of the last five"),
        }

    def build(self, folder: Path) -> None:
        self.base = small(self.quick)
        crowd(copy.deepcopy(self.base), 2)  # imports and caches

    def outputs(self) -> dict[str, Tensor]:
        model, _ = crowd(copy.deepcopy(self.base), 3)
        randomise(model, "a2")
        model.set_adapter("a2")
        return with_effect(model, logits=lambda: model(input_ids=tokens(1, 16, 256)).logits)

    def sample(self) -> dict[str, float]:
        firsts = [self.first() for _ in range(3)]
        _, times = crowd(copy.deepcopy(self.base), self.n)
        firsts += [self.first() for _ in range(3)]
        first, last = statistics.median(firsts), statistics.median(times[-5:])
        return {"100th ÷ first": last / first, "first": 1e3 * first, "100th": 1e3 * last}

    def first(self) -> float:
        return crowd(copy.deepcopy(self.base), 1)[1][0]


def cases(quick: bool) -> list[Case]:
    return [Add(quick)]
