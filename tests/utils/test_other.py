"""What trainers ask of peft.utils: units for FSDP, labels shifted right."""

from __future__ import annotations

import torch

import peft
from peft import get_peft_model
from tests.helpers.tiny_llama import llama, lora


def test_fsdp_wraps_blocks_and_methods():
    from peft.contract.method import Method
    from peft.utils.other import fsdp_auto_wrap_policy

    model = get_peft_model(llama(), lora())
    policy = fsdp_auto_wrap_policy(model)
    units = [m for m in model.modules() if policy(module=m, recurse=False, nonwrapped_numel=10**9)]
    assert {type(m).__name__ for m in units if not isinstance(m, Method)} == {"LlamaDecoderLayer"}
    assert sum(isinstance(m, Method) for m in units) == 4


def test_shifting_labels_right():
    labels = torch.tensor([[5, 6, -100], [1, -100, 3]])
    assert peft.shift_tokens_right(labels, 0, 9).tolist() == [[9, 5, 6], [9, 1, 0]]
