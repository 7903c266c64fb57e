"""A DoRA train step ÷ the LoRA one. With dropout, DoRA needs a second product with W: the norm belongs to the dropped
input's delta, the base output to the whole input."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from ..case import AHEAD, Case, Figure, at_most
from ..measure import Turns
from ..models import floor, llama, lora, randomise, step, step_outputs, tokens
from .step import SMALL

TITLE = "DoRA step ÷ LoRA step"


class Dora(Case):
    def __init__(self, name: str, quick: bool) -> None:
        self.name, self.quick = name, quick
        self.half, self.dropout = "bf16" in name, 0.05 if "dropout" in name else 0.0
        self.tolerance = 5e-2 if self.half else 1e-4
        self.draws = 24 if self.dropout else 0
        self.figures = {
            "step": Figure("×", () if self.dropout else (at_most(1.25),)),
            "÷ floor": Figure("×", (AHEAD,), "÷ the frozen floor"),
            "ms": Figure("ms", what="the DoRA step itself"),
        }

    def build(self, folder: Path) -> None:
        from peft import get_peft_model

        base = llama(**(SMALL if self.quick else {}), dtype=torch.bfloat16 if self.half else torch.float32)
        self.ids = tokens(2, 16, 128) if self.quick else tokens(4, 256)
        self.floor = floor(base)
        self.lora, self.dora = (
            randomise(
                get_peft_model(
                    copy.deepcopy(base), lora(lora_dropout=self.dropout, use_dora=dora, task_type="CAUSAL_LM")
                ).train()
            )
            for dora in (False, True)
        )

    def outputs(self) -> dict[str, Tensor]:
        return step_outputs(self.dora, self.ids[:1, :64])

    def sample(self) -> dict[str, float]:
        models = {"floor": self.floor, "lora": self.lora, "dora": self.dora}
        turns = Turns(2 if self.quick else 3, **{name: step(model, self.ids) for name, model in models.items()})
        return {
            "step": turns.ratio("dora", "lora"),
            "÷ floor": turns.ratio("dora", "floor"),
            "ms": 1e3 * turns.median("dora"),
        }


def cases(quick: bool) -> list[Case]:
    return [Dora(name, quick) for name in ("fp32", "bf16", "fp32 dropout", "bf16 dropout")]
