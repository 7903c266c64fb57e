"""A train step compiled by inductor in one graph ÷ the frozen model's, compiled alike. Two layers of the Llama shape."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..case import AHEAD, Case, Figure, Unsupported
from ..measure import Turns, once
from ..models import gradients, llama, lora, randomise, step_outputs, tokens
from .step import SMALL

TITLE = "Compiled train step ÷ compiled frozen floor"


class Compiled(Case):
    def __init__(self, name: str, quick: bool) -> None:
        self.name, self.quick, self.dropout = name, quick, 0.05 if "dropout" in name else 0.0
        self.draws = 24 if self.dropout else 0
        self.figures = {
            "step": Figure("×", (AHEAD,)),
            "ms": Figure("ms"),
            "compiling": Figure("s", what="the first step"),
        }

    def build(self, folder: Path) -> None:
        from peft import get_peft_model

        torch._dynamo.reset()
        base = llama(**(SMALL if self.quick else {"layers": 2}))
        self.ids = tokens(2, 16, 128) if self.quick else tokens(4, 256)
        self.model = randomise(
            get_peft_model(copy.deepcopy(base), lora(lora_dropout=self.dropout, task_type="CAUSAL_LM")).train()
        )
        self.took: list[float] = []
        embedded = base.get_input_embeddings()(self.ids).detach().requires_grad_()  # type: ignore[operator]
        self.steps = {
            "floor": self.step(base, [embedded], inputs_embeds=embedded),
            "step": self.step(self.model, [p for p in self.model.parameters() if p.requires_grad], input_ids=self.ids),
        }

    def step(self, model: nn.Module, leaves: list[Tensor], **inputs: Tensor) -> Callable[[], None]:
        run = torch.compile(lambda: model(labels=self.ids, **inputs).loss, fullgraph=True)

        def one() -> None:
            run().backward()
            for p in leaves:
                p.grad = None

        try:
            self.took.append(once(one))
        except torch._dynamo.exc.Unsupported as e:
            raise Unsupported(f"no one graph: {str(e).splitlines()[0][:90]}") from e
        return one

    def outputs(self) -> dict[str, Tensor]:
        if self.dropout:
            return step_outputs(self.model, self.ids[:1, :64])
        torch.compile(lambda ids: self.model(input_ids=ids, labels=ids).loss, fullgraph=True)(self.ids).backward()
        return gradients(self.model)

    def sample(self) -> dict[str, float]:
        turns = Turns(2 if self.quick else 5, **self.steps)
        return {
            "step": turns.ratio("step", "floor"),
            "ms": 1e3 * turns.median("step"),
            "compiling": statistics.median(self.took[1:]),
        }


def cases(quick: bool) -> list[Case]:
    return [Compiled(name, quick) for name in ("fp32", "fp32 dropout")]
