"""Loading an adapter of 560 targets (80 layers of width 64, r=16) from its folder, and the forward after it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..case import Case, Figure, at_most, faster
from ..measure import once, seconds
from ..models import llama, lora, randomise, tokens, with_effect

TITLE = "Load an adapter of 560 targets"


def base_model(quick: bool) -> Any:
    return llama(hidden=64, layers=2 if quick else 80, inner=128, heads=4, vocabulary=256)


def write(folder: Path, quick: bool) -> None:
    """The adapter that both libraries read."""
    from peft import get_peft_model

    model = get_peft_model(base_model(quick), lora(16, task_type="CAUSAL_LM"))
    randomise(model).save_pretrained(str(folder))


class Load(Case):
    def __init__(self, name: str, quick: bool, **how: Any) -> None:
        self.name, self.how, self.quick = name, how, quick
        goal = (faster(10),)
        self.figures = {
            "from_pretrained": Figure("ms", goal),
            "load_adapter": Figure("ms", goal, "a further adapter"),
            "forward after": Figure("×", (at_most(1.1),), "the first forward ÷ the third"),
        }

    def fixture(self, folder: Path) -> None:
        write(folder, self.quick)

    def build(self, folder: Path) -> None:
        self.folder = str(folder)
        self.base = base_model(self.quick)
        self.ids = tokens(1, 8, 256)

    def load(self) -> tuple[Any, float]:
        from peft import PeftModel

        base, made = copy.deepcopy(self.base), []
        took = once(lambda: made.append(PeftModel.from_pretrained(base, self.folder, **self.how)))
        return made[0].eval(), took

    def outputs(self) -> dict[str, Tensor]:
        model, _ = self.load()
        first = with_effect(model, first=lambda: model(input_ids=self.ids).logits)
        model.load_adapter(self.folder, "second", **self.how)
        model.set_adapter("second")
        return first | with_effect(model, second=lambda: model(input_ids=self.ids).logits)

    def sample(self) -> dict[str, float]:
        with torch.no_grad():
            base = copy.deepcopy(self.base).eval()
            base(input_ids=self.ids)
            model, took = self.load()
            forwards = [seconds(lambda: model(input_ids=self.ids)) for _ in range(3)]
            more = once(lambda: model.load_adapter(self.folder, "second", **self.how))
        return {
            "from_pretrained": 1e3 * took,
            "load_adapter": 1e3 * more,
            "forward after": forwards[0] / forwards[2],
        }


def cases(quick: bool) -> list[Case]:
    return [Load("as it comes", quick), Load("low_cpu_mem_usage", quick, low_cpu_mem_usage=True)]
