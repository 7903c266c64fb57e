"""Parameters counted three ways."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import peft
from peft import get_peft_model
from peft.core.report.counts import count, counts, trainable_and_total
from tests.helpers.tiny_llama import llama, lora


def test_the_three_counts():
    model = get_peft_model(llama(), lora(rank_pattern={"v_proj": 2}, modules_to_save=["lm_head"]))
    found = peft.counts(model)
    head, each = 64 * 16, 16 * 16
    assert found.trainable == 2 * (4 + 2) * 32 + head == model.get_nb_trainable_parameters()[0]
    assert found.updated == 4 * each + head, "all of each adapted weight, and the head"
    assert found.total == model.get_nb_trainable_parameters()[1]
    path = "model.layers.{}.self_attn.{}_proj".format
    assert {p: r for p, r in found.ranks.items() if "self_attn" in p} == {
        **{path(i, "q"): 4 for i in (0, 1)},
        **{path(i, "v"): 2 for i in (0, 1)},
    }
    bias = get_peft_model(llama(attention_bias=True), lora(target_modules=["q_proj"], bias="all"))
    found = peft.counts(bias)
    assert found.updated == 2 * each + 2 * 4 * 16 and found.trainable == 2 * 4 * 32 + 2 * 4 * 16
    several = get_peft_model(llama(), lora())
    several.add_adapter("b", lora(r=3))
    several.base_model.set_adapter(["default", "b"])
    assert set(peft.counts(several).ranks.values()) == {7} and peft.counts(several, "b").rank == 3


def test_prompts_update_no_weight():
    model = get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    found = peft.counts(model)
    assert (found.trainable, found.updated, found.rank, found.ranks) == (3 * 16, 0, None, {})


def test_parameters_are_counted_by_their_logical_size():
    plain = nn.Parameter(torch.zeros(3, 4))
    assert count(plain) == 12
    codes = torch.zeros(6, 1, dtype=torch.uint8)
    codes.quant_state = SimpleNamespace(shape=(3, 4))
    assert count(codes) == 12, "two 4-bit codes lie in a byte"
    away = torch.empty(0)
    away.ds_numel = 40
    assert count(away) == 40, "ZeRO-3 keeps the size aside"
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    assert trainable_and_total(net) == (10, 26)
    with pytest.raises(ValueError, match="no adapters"):
        counts(net)
