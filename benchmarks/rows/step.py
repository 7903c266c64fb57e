"""Forward and backward of a LoRA model ÷ the same of the frozen model, whose gradient flows down to the embeddings.

Llama shape, r=16 on all seven projections of each layer, B random. The adapted model runs as in training: its
embedding is frozen, so that the first layer need not hand a gradient further down.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from ..case import AHEAD, Case, Figure, at_most
from ..measure import Turns
from ..models import floor, llama, lora, randomise, step, step_outputs, tokens

TITLE = "Train step ÷ frozen floor"
SMALL = {"hidden": 64, "layers": 1, "inner": 128, "heads": 2, "vocabulary": 128}
GOALS = {"fp32": 1.20, "bf16": 1.20, "fp32 dropout": 1.35, "bf16 dropout": 1.5}


class Step(Case):
    def __init__(self, name: str, quick: bool) -> None:
        self.name, self.quick = name, quick
        self.half, self.dropout = "bf16" in name, 0.05 if "dropout" in name else 0.0
        self.tolerance = 5e-2 if self.half else 1e-4
        self.draws = 24 if self.dropout else 0
        self.figures = {
            "step": Figure("×", (at_most(GOALS[name]), AHEAD)),
            "ms": Figure("ms", what="the step itself"),
            "floor ms": Figure("ms", what="the frozen floor"),
        }

    def build(self, folder: Path) -> None:
        from peft import get_peft_model

        base = llama(**(SMALL if self.quick else {}), dtype=torch.bfloat16 if self.half else torch.float32)
        self.ids = tokens(2, 16, 128) if self.quick else tokens(4, 256)
        self.floor = floor(base)
        self.model = get_peft_model(copy.deepcopy(base), lora(lora_dropout=self.dropout, task_type="CAUSAL_LM"))
        randomise(self.model.train())

    def outputs(self) -> dict[str, Tensor]:
        return step_outputs(self.model, self.ids[:1, :64])

    def sample(self) -> dict[str, float]:
        turns = Turns(2 if self.quick else 5, floor=step(self.floor, self.ids), step=step(self.model, self.ids))
        return {
            "step": turns.ratio("step", "floor"),
            "ms": 1e3 * turns.median("step"),
            "floor ms": 1e3 * turns.median("floor"),
        }


def cases(quick: bool) -> list[Case]:
    return [Step(name, quick) for name in GOALS]
