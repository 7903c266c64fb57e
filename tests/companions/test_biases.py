"""The `bias` field: copies of biases beside a method."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.companions.biases import BiasAlong, BiasSites
from tests.helpers.selective import IDS, bits, llama, same, train


@pytest.mark.parametrize(("bias", "trained"), [("none", 0), ("all", 2 * (16 + 8 + 8 + 16)), ("lora_only", 2 * 16)])
def test_the_bias_field_trains_copies_of_biases(bias, trained):
    base = llama()
    before, expected = bits(base), base(IDS).logits
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], bias=bias))
    extra = [p for n, p in model.named_parameters() if p.requires_grad and "bitfit" in n]
    assert sum(p.numel() for p in extra) == trained
    train(model, lambda m: m(IDS, labels=IDS).loss)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
    assert same(model.base_model.unload(), before)


def test_all_takes_every_bias_and_only_those_of_the_targets():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.LayerNorm(3))

    def at(**fields):
        places, along = BiasAlong.accompany(LoraConfig(target_modules=["0", "2"], **fields), net)
        return [p.path for p in places], along

    assert at(bias="lora_only") == (["0"], BiasSites({"0", "2"})), "a target without a bias has none to train"
    assert at(bias="all") == (["0", "1", "3"], BiasSites({"0", "2"}))
    assert at(bias="all", modules_to_save=["3"])[0] == ["0", "1"], "what is saved whole has its bias"


def test_a_bias_keeps_its_name_on_disk():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model = get_peft_model(net, LoraConfig(r=1, target_modules=["0"], bias="all"))
    from peft import get_peft_model_state_dict

    keys = {k.removeprefix("base_model.model.") for k in get_peft_model_state_dict(model) if "bias" in k}
    assert keys == {"0.base_layer.bias", "1.bias"}
