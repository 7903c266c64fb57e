"""LoRA+: four groups with rates of their own."""

from __future__ import annotations

import torch
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.optimizers.loraplus import EMBEDDING_LR, create_loraplus_optimizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.norm = nn.LayerNorm(6)
        self.site = nn.Linear(6, 4)

    def forward(self, ids):
        return self.site(self.norm(self.table(ids)))


def test_each_parameter_is_in_its_group_with_its_rate():
    config = LoraConfig(r=2, target_modules=["site"], modules_to_save=["table", "norm"], lora_bias=True)
    model = get_peft_model(Net(), config)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1, betas=(0.8, 0.9)
    )
    m = model.get_base_model().site.methods["default"][0]
    table, norm = (model.get_base_model().get_submodule(n).methods["default"][0] for n in ("table", "norm"))
    first, tables, last, undecayed = optimizer.param_groups

    def held(group):
        return {id(p) for p in group["params"]}

    assert held(first) == {id(m.lora_A_weight)} and held(tables) == {id(p) for p in table.parameters()}
    assert held(last) | held(undecayed) == {id(m.lora_B_weight), id(m.lora_B_bias), *(id(p) for p in norm.parameters())}
    assert id(m.lora_B_weight) in held(last) and id(m.lora_B_bias) in held(undecayed)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, EMBEDDING_LR, 16e-3, 16e-3]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.0]
    assert all(g["betas"] == (0.8, 0.9) for g in optimizer.param_groups)


def test_the_tables_rate_can_be_stated():
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["table"]))
    optimizer = create_loraplus_optimizer(
        model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=2.0, loraplus_lr_embedding=0.5
    )
    m = model.get_base_model().table.methods["default"][0]
    assert optimizer.param_groups[1]["lr"] == 0.5 and not optimizer.param_groups[1]["params"]
    assert [p is m.lora_A_weight for p in optimizer.param_groups[0]["params"]] == [True]
    assert [p is m.lora_B_weight for p in optimizer.param_groups[2]["params"]] == [True]
