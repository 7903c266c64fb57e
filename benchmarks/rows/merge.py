"""Merging LoRA (r=16) into Linear layers ÷ the least it takes: W's copy, which makes unmerging exact, and an in-place
`addmm_` of the two factors, in fp32 tiles of W where W is in bf16. (An `addmm_` in bf16 itself is about twice as fast; it
rounds the factors, and one weight in twenty comes out as another number than the sum rounded once.) `merge_and_unload`
needs no copy, so its floor is the `addmm_` alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..case import Case, Figure, at_most
from ..measure import once
from ..models import Stack, lora, randomise

TITLE = "Merge and unmerge ÷ copy + in-place addmm_"


class Merge(Case):
    def __init__(self, half: bool, quick: bool) -> None:
        self.name = "bf16" if half else "fp32"
        self.dtype = torch.bfloat16 if half else torch.float32
        self.tolerance = 2e-2 if half else 1e-5
        self.figures = {
            "merge": Figure("×", (at_most(1.3),)),
            "unmerge": Figure("×", (at_most(1.3),)),
            "merge_and_unload": Figure("×", (at_most(1.3),), "÷ addmm_ without the copy"),
            "changed": Figure("weights", (at_most(0),), "whose bits differ after merging and unmerging ten times"),
            "drift": Figure("of max", what="the largest change of a weight by that, ÷ the largest weight"),
            "floor ms": Figure("ms", what="copy + addmm_"),
        }

    def build(self, folder: Path) -> None:
        d = 64 if self.quick else 1024
        self.base = Stack([d, 2 * d, 2 * d, d, 2 * d, d], self.dtype)
        self.settings = {"target_modules": r".*layers\.\d+"}
        self.scale = 2.0

    def adapted(self) -> Any:
        from peft import get_peft_model

        return randomise(get_peft_model(copy.deepcopy(self.base), lora(16, **self.settings)))

    def weights(self, model: Any) -> dict[str, Tensor]:
        """The base weights, wherever the library keeps them."""
        return {
            k.replace(".base_layer", ""): v
            for k, v in model.get_base_model().state_dict().items()
            if "lora" not in k and k.endswith("weight")
        }

    def outputs(self) -> dict[str, Tensor]:
        model = self.adapted()
        model.merge_adapter()
        merged = {f"merged {k}": v.clone() for k, v in self.weights(model).items()}
        model.unmerge_adapter()
        x = torch.randn(2, self.base.layers[0].in_features, generator=torch.Generator().manual_seed(3)).to(self.dtype)
        return {**merged, "unmerged output": model(x)}

    def floors(self) -> tuple[float, float]:
        made = []
        for layer in self.base.layers:
            W = layer.weight.detach().clone()
            made.append((W, torch.randn(16, W.shape[1]), torch.randn(W.shape[0], 16)))
        kept: list[Tensor] = []

        def add(W: Tensor, A: Tensor, B: Tensor) -> None:
            if W.dtype is torch.float32:
                W.addmm_(B, A, alpha=self.scale)
                return
            rows = max(1, 2**18 // W.shape[1])
            for i in range(0, len(W), rows):
                W[i : i + rows] = W[i : i + rows].float().addmm_(B[i : i + rows], A, alpha=self.scale)

        def bare() -> None:
            for W, A, B in made:
                add(W, A, B)

        def copying() -> None:
            for W, A, B in made:
                kept.append(W.clone())
                add(W, A, B)

        bare()
        return once(copying), once(bare)

    def sample(self) -> dict[str, float]:
        n = 2 if self.quick else 3
        merge, unmerge, unload, with_copy, without = [], [], [], [], []
        with torch.no_grad():
            for _ in range(n):
                a, b = self.floors()
                with_copy.append(a)
                without.append(b)
                model = self.adapted()
                before = {k: v.clone() for k, v in self.weights(model).items()}
                merge.append(once(model.merge_adapter) / a)
                unmerge.append(once(model.unmerge_adapter) / a)
                del model
                model = self.adapted()
                unload.append(once(model.merge_and_unload) / b)
            model = self.adapted()
            for _ in range(10):
                model.merge_adapter()
                model.unmerge_adapter()
            after = self.weights(model)
        middle = lambda values: sorted(values)[len(values) // 2]
        gap = max((after[k].float() - before[k].float()).abs().max().item() for k in before)
        top = max(v.abs().max().item() for v in before.values())
        return {
            "merge": middle(merge),
            "unmerge": middle(unmerge),
            "merge_and_unload": middle(unload),
            "changed": sum(int((after[k] != before[k]).sum()) for k in before),
            "drift": gap / top,
            "floor ms": 1e3 * middle(with_copy),
        }


def cases(quick: bool) -> list[Case]:
    return [Merge(False, quick), Merge(True, quick)]
