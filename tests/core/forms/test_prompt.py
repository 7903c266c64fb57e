"""What all prompts share: their start."""

from __future__ import annotations

import torch

from peft import get_peft_model
from tests.golden.prompt import make
from tests.helpers.prompts import config


def test_a_seed_decides_the_start_and_nothing_else_does():
    def start(draws: int) -> torch.Tensor:
        torch.rand(draws)
        settings = config("P_TUNING", 1, "llama_gqa", seed=4)
        return get_peft_model(make.build("llama_gqa"), settings).get_prompt_embedding_to_save("default")

    assert torch.equal(start(1), start(5))
