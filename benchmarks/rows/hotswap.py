"""Twenty swaps of an adapter's weights in a compiled model: how often it compiles again, and what a swap takes."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..case import Case, Figure, Unsupported, at_most
from ..measure import once
from ..models import llama, randomise, tokens

TITLE = "Hot swap into a compiled model, 20 swaps"
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 8, **TARGETS}),
    "LoRA, ranks 4 to 16": ("LoraConfig", {"r": 16, **TARGETS}),
    "DoRA": ("LoraConfig", {"r": 8, "use_dora": True, **TARGETS}),
    "LoHa": ("LoHaConfig", {"r": 4, **TARGETS}),
    "LoKr": ("LoKrConfig", {"r": 4, **TARGETS}),
    "VeRA": ("VeraConfig", {"r": 16, "target_modules": ["q_proj"], "save_projection": True}),
    "(IA)³": ("IA3Config", {**TARGETS, "feedforward_modules": ["down_proj"]}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 8, "target_r": 4, "total_step": 10, **TARGETS}),
}


class Hotswap(Case):
    tolerance = 1e-3
    compiler = "aot_eager"

    def __init__(self, method: str, quick: bool) -> None:
        self.name, self.quick = method, quick
        self.swaps = 3 if quick else 20
        self.figures = {
            "recompiles": Figure("", (at_most(0),), "over all swaps"),
            "swap": Figure("ms", what="one swap from a folder"),
            "steps": Figure("ms", what="a forward after a swap"),
        }

    def config(self, k: int) -> Any:
        import peft

        kind, settings = METHODS[self.name]
        if "ranks" in self.name and k:
            settings = {**settings, "r": 4 if k % 2 else 16}
        return getattr(peft, kind)(task_type="CAUSAL_LM", **settings)

    def base(self) -> Any:
        return llama(hidden=64, layers=2, inner=128, heads=4, vocabulary=256)

    def fixture(self, folder: Path) -> None:
        from peft import get_peft_model

        for k in range(3):
            model = get_peft_model(self.base(), self.config(k))
            randomise(model, salt=str(k)).save_pretrained(str(folder / str(k)))

    def build(self, folder: Path) -> None:
        from peft import PeftModel
        from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

        torch._dynamo.reset()
        self.folder, self.compiled = folder, 0
        self.ids = tokens(2, 16, 256)
        self.model = PeftModel.from_pretrained(self.base(), str(folder / "0")).eval()

        def swap(k: int) -> None:
            hotswap_adapter(self.model, str(self.folder / str(k)), "default")

        self.swap = swap
        try:
            if "ranks" in self.name:
                prepare_model_for_compiled_hotswap(self.model, target_rank=16)
            swap(1)
        except Exception as e:
            raise Unsupported(f"{type(e).__name__}: {str(e).splitlines()[0][:90]}") from e
        self.model = torch.compile(self.model, backend=self.backend)

    def backend(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.registry import lookup_backend

        self.compiled += 1
        return lookup_backend(self.compiler)(graph, inputs)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids=self.ids).logits

    def outputs(self) -> dict[str, Tensor]:
        found = {}
        for k in (1, 2, 0):
            self.swap(k)
            found[f"adapter {k}"] = self.forward()
        return {**found, "what a swap changes": found["adapter 2"] - found["adapter 1"]}

    def sample(self) -> dict[str, float]:
        self.forward()
        before = self.compiled
        swaps, forwards = [], []
        for k in range(self.swaps):
            swaps.append(once(lambda k=k: self.swap(k % 3)))
            forwards.append(once(self.forward))
        return {
            "recompiles": self.compiled - before,
            "swap": 1e3 * statistics.median(swaps),
            "steps": 1e3 * statistics.median(forwards),
        }


def cases(quick: bool) -> list[Case]:
    return [Hotswap(name, quick) for name in METHODS]
