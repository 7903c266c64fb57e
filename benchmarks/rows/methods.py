"""Train steps of other methods ÷ the frozen floor of the same model.

The floor's gradient flows down to the embeddings; below a method's first site none has to, so that a method which
leaves the first layer alone may take less than the floor.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..case import AHEAD, Case, Figure, Unsupported
from ..measure import Turns, live_bytes
from ..models import floor, llama, randomise, step, step_outputs, tokens
from .step import SMALL

TITLE = "Other methods' step ÷ frozen floor"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "(IA)³": (
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "VeRA": ("VeraConfig", {"target_modules": ["q_proj", "v_proj", "o_proj"], "r": 64, "save_projection": True}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 16}),
    "bottleneck": ("BottleneckConfig", {"bottleneck_size": 32}),
}


class Other(Case):
    def __init__(self, method: str, half: bool, quick: bool) -> None:
        self.method, self.half, self.quick = method, half, quick
        self.name = f"{method} {'bf16' if half else 'fp32'}"
        self.only_ours = method == "bottleneck"
        self.tolerance = 5e-2 if half else 1e-4
        self.figures = {
            "step": Figure("×", () if self.only_ours else (AHEAD,)),
            "ms": Figure("ms"),
            "live": Figure("×", what="bytes alive between forward and backward ÷ floor"),
        }

    def build(self, folder: Path) -> None:
        import peft

        kind, settings = METHODS[self.method]
        if not hasattr(peft, kind):
            raise Unsupported(f"no {kind}")
        base = llama(**(SMALL if self.quick else {}), dtype=torch.bfloat16 if self.half else torch.float32)
        self.ids = tokens(2, 16, 128) if self.quick else tokens(4, 256)
        self.floor = floor(base)
        self.model = peft.get_peft_model(copy.deepcopy(base), getattr(peft, kind)(task_type="CAUSAL_LM", **settings))
        # VeRA's effect is the product of two vectors and two banks, and would drown in the rounding of the logits
        randomise(self.model.train(), scale=0.2 if self.method == "VeRA" else 0.02)

    def outputs(self) -> dict[str, Tensor]:
        return step_outputs(self.model, self.ids[:1, :64])

    def sample(self) -> dict[str, float]:
        turns = Turns(2 if self.quick else 4, floor=step(self.floor, self.ids), step=step(self.model, self.ids))
        live, least = (
            live_bytes(lambda m=m: m(input_ids=self.ids, labels=self.ids).loss) for m in (self.model, self.floor)
        )
        return {"step": turns.ratio("step", "floor"), "ms": 1e3 * turns.median("step"), "live": live / least}


def cases(quick: bool) -> list[Case]:
    return [Other(method, half, quick) for method in METHODS for half in (False, True)]
