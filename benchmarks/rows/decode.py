"""Host time of decoding (one token, no gradients) per adapted Linear, beyond the base layer and the two small products.

The layers are narrow, so that nearly all the time is the host's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..case import Case, Figure, at_most
from ..measure import Turns
from ..models import Stack, lora, randomise, with_effect

TITLE = "Decode: host time per adapted Linear"


class Decode(Case):
    def __init__(self, half: bool, quick: bool) -> None:
        self.name = "bf16" if half else "fp32"
        self.dtype = torch.bfloat16 if half else torch.float32
        self.tolerance = 5e-2 if half else 1e-4
        self.figures = {
            "beyond the products": Figure("µs", (at_most(4),)),
            "base layer": Figure("µs"),
            "two products": Figure("µs"),
            "adapted layer": Figure("µs"),
        }

    def build(self, folder: Path) -> None:
        from peft import get_peft_model

        self.n, d = (4, 64) if self.quick else (64, 64)
        self.base = Stack([d] * (self.n + 1), self.dtype).eval()
        stack = Stack([d] * (self.n + 1), self.dtype)
        self.model = randomise(get_peft_model(stack, lora(16, target_modules=r".*layers\.\d+")), scale=0.1).eval()
        self.inner = self.model.get_base_model()
        self.x = torch.randn(1, 1, d, generator=torch.Generator().manual_seed(3)).to(self.dtype)
        self.factors = [(torch.randn(16, d).to(self.dtype), torch.randn(d, 16).to(self.dtype)) for _ in range(self.n)]

    def outputs(self) -> dict[str, Tensor]:
        return with_effect(self.model, output=lambda: self.model(self.x))

    def products(self) -> None:
        x = self.x
        for A, B in self.factors:
            F.linear(F.linear(x, A), B)

    def sample(self) -> dict[str, float]:
        with torch.no_grad():
            turns = Turns(
                20 if self.quick else 100,
                base=lambda: self.base(self.x),
                products=self.products,
                adapted=lambda: self.inner(self.x),
            )
        base, products, adapted = (1e6 * turns.median(k) / self.n for k in ("base", "products", "adapted"))
        return {
            "beyond the products": adapted - base - products,
            "base layer": base,
            "two products": products,
            "adapted layer": adapted,
        }


def cases(quick: bool) -> list[Case]:
    return [Decode(False, quick), Decode(True, quick)]
