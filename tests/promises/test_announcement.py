"""The figures of the library's announcement, on the meta device: the architectures are real, their weights are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from peft import LoraConfig, TaskType, counts, dry_run, get_peft_model

CONFIG = {"task_type": TaskType.SEQ_2_SEQ_LM, "r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "inference_mode": False}
GATED = {"d_kv": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu"}


def mt0_large(own_head: bool) -> MT5ForConditionalGeneration:
    sizes = {"d_model": 1024, "d_ff": 2816, "num_heads": 16, "vocab_size": 250112}
    with torch.device("meta"):
        model = MT5ForConditionalGeneration(MT5Config(**sizes, **GATED))
        if own_head:
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        else:
            model.lm_head.weight = model.shared.weight
    return model


@pytest.mark.parametrize(("own_head", "total"), [(True, 1_231_940_608), (False, 975_825_920)])
def test_lora_on_mt0_large(own_head, total, capsys):
    model = get_peft_model(mt0_large(own_head), LoraConfig(**CONFIG))
    assert model.get_nb_trainable_parameters() == (2_359_296, total)
    model.print_trainable_parameters()
    share = 100 * 2_359_296 / total
    assert f"trainable params: 2,359,296 || all params: {total:,} || trainable%: {share:.4f}" in capsys.readouterr().out
    found = counts(model)
    assert (found.trainable, found.total, found.rank) == (2_359_296, total, 8)
    assert found.updated == 144 * 1024 * 1024 and len(found.ranks) == 144  # q and v, whole: 24 + 2 · 24 blocks


def test_the_dry_run_says_the_same_before():
    rows = dry_run(mt0_large(True), LoraConfig(**CONFIG))
    assert sum(r.parameters for r in rows) == 2_359_296
    assert {r.path.rsplit(".", 1)[-1] for r in rows} == {"q", "v"}


def test_lora_on_t0_3b_is_two_files_of_19_mb(tmp_path):
    sizes = {"d_model": 2048, "d_ff": 5120, "num_heads": 32, "vocab_size": 32128}
    with torch.device("meta"):
        base = T5ForConditionalGeneration(T5Config(**sizes, **GATED))
    model = get_peft_model(base, LoraConfig(**CONFIG))
    for _, method in model.roster.adapters["default"].methods:
        method.to_empty(device="cpu")
        for p in method.parameters():
            nn.init.zeros_(p)
    model.save_pretrained(tmp_path)
    files = {f.name: f.stat().st_size for f in tmp_path.iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert round(files["adapter_model.safetensors"] / 1e6) == 19
