"""Adding LoRA adapters (r=16) to 2,002 Linear layers of width 64: the first, and the third ÷ the first."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..case import Case, Figure, faster, near
from ..measure import once
from ..models import Blocks, lora, randomise, with_effect

TITLE = "Inject LoRA into 2,002 Linear layers"


class Inject(Case):
    def __init__(self, name: str, later: bool, quick: bool) -> None:
        self.name, self.later, self.quick = name, later, quick
        self.figures = {
            "first": Figure("ms", (faster(15 if later else 8),)),
            "third": Figure("ms"),
            "third ÷ first": Figure("×", (near(1, 0.1),)),
        }

    def build(self, folder: Path) -> None:
        self.base = Blocks(2 if self.quick else 286, 64)

    def inject(self, later: bool) -> tuple[Any, float, float]:
        """A model with three adapters, and the seconds that the first and the third took."""
        from peft import get_peft_model

        base = copy.deepcopy(self.base)
        made: list[Any] = []
        first = once(lambda: made.append(get_peft_model(base, lora(16), low_cpu_mem_usage=later)))
        model = made[0]
        model.add_adapter("second", lora(16), low_cpu_mem_usage=later)
        third = once(lambda: model.add_adapter("third", lora(16), low_cpu_mem_usage=later))
        return model, first, third

    def outputs(self) -> dict[str, Tensor]:
        """The third adapter's output with weights put in, so that all three are in place, and its trained shapes."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        model, *_ = self.inject(self.later)
        if self.later:  # no values yet: they come from a twin that has some
            twin, *_ = self.inject(later=False)
            state = get_peft_model_state_dict(randomise(twin, "third"), adapter_name="third")
            set_peft_model_state_dict(model, state, adapter_name="third", low_cpu_mem_usage=True)
        else:
            randomise(model, "third")
        model.set_adapter("third")
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
        return {
            **with_effect(model, output=lambda: model(x)),
            "trained": torch.tensor([sum(p.numel() for p in model.parameters() if p.requires_grad)]),
        }

    def sample(self) -> dict[str, float]:
        _, first, third = self.inject(self.later)
        return {"first": 1e3 * first, "third": 1e3 * third, "third ÷ first": third / first}


def cases(quick: bool) -> list[Case]:
    return [Inject("random init", False, quick), Inject("weights will be loaded", True, quick)]
