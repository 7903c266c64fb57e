"""A batch whose rows use different adapters ÷ the same batch with one adapter. Linear layers of width 512, r=16."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..case import AHEAD, Case, Figure, at_most
from ..measure import Turns
from ..models import Stack, gradients, lora, randomise

TITLE = "One batch with N adapters ÷ with one"


class Rows(Case):
    def __init__(self, rows: int, length: int, reach: float, quick: bool) -> None:
        self.rows, self.length, self.quick = (4, length, quick) if quick else (rows, length, quick)
        self.name = f"{rows} rows, {rows} adapters, T={length}"
        self.figures = {
            "forward": Figure("×", (at_most(reach), AHEAD)),
            "forward and backward": Figure("×", (at_most(reach), AHEAD)),
            "forward ms": Figure("ms"),
            "one adapter ms": Figure("ms"),
        }

    def build(self, folder: Path) -> None:
        from peft import get_peft_model

        width = 64 if self.quick else 512
        self.names = [f"a{k}" for k in range(self.rows)]
        settings = {"target_modules": r".*layers\.\d+"}
        self.model = get_peft_model(Stack([width] * 9), lora(16, **settings), adapter_name="a0")
        for name in self.names[1:]:
            self.model.add_adapter(name, lora(16, **settings))
        for name in self.names:
            randomise(self.model, name, salt=name)
        self.model.eval()  # upstream mixes adapters in eval mode only; gradients flow all the same
        self.model.set_adapter("a0")
        self.model.set_requires_grad(self.names, True)
        self.x = torch.randn(self.rows, self.length, width, generator=torch.Generator().manual_seed(3))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def call(self, mixed: bool) -> Tensor:
        return self.model(self.x, adapter_names=self.names) if mixed else self.model(self.x)

    def forward(self, mixed: bool) -> None:
        with torch.no_grad():
            self.call(mixed)

    def both(self, mixed: bool) -> None:
        self.call(mixed).sum().backward()
        for p in self.trained:
            p.grad = None

    def outputs(self) -> dict[str, Tensor]:
        y = self.call(True)
        y.square().sum().backward()
        found = {f"{name} {k}": v for name in self.names[:3] for k, v in self.gradient(name).items()}
        for p in self.trained:
            p.grad = None
        return {"output": y, **found}

    def gradient(self, name: str) -> dict[str, Tensor]:
        held = [p.grad for p in self.trained]
        found = gradients(self.model, name)
        for p, g in zip(self.trained, held, strict=True):
            p.grad = g
        return found

    def sample(self) -> dict[str, float]:
        n = 3 if self.quick else 20
        turns = Turns(n, one=lambda: self.forward(False), many=lambda: self.forward(True))
        steps = Turns(n, one=lambda: self.both(False), many=lambda: self.both(True))
        return {
            "forward": turns.ratio("many", "one"),
            "forward and backward": steps.ratio("many", "one"),
            "forward ms": 1e3 * turns.median("many"),
            "one adapter ms": 1e3 * turns.median("one"),
        }


def cases(quick: bool) -> list[Case]:
    return [Rows(16, 16, 1.2, quick), Rows(32, 1, 1.5, quick)]
