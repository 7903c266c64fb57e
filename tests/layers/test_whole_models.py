"""Whole models of many kinds of layers, merged and reloaded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from peft import LoraConfig, PeftModel, get_peft_model
from tests.layers.holding import close, shake


def gpt2():
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=16)
    return GPT2LMHeadModel(config), {"input_ids": torch.arange(12).view(2, 6)}, "all-linear", 8


def vit():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    return ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 8, 8)}, ["q_proj", "projection"], 3


def clip():
    side = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    text = {**side, "vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 39, "bos_token_id": 38}
    config = CLIPConfig(text_config=text, vision_config={**side, "image_size": 8, "patch_size": 4}, projection_dim=8)
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8), "input_ids": torch.tensor([[1, 2, 39, 39], [3, 4, 5, 39]])}
    return CLIPModel(config), inputs, ["token_embedding", "patch_embedding", "q_proj", "text_projection"], 5


def convnet():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4, dilation=2, padding="same"),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, 3),
    )
    return net, {"input": torch.randn(4, 3, 8, 8)}, ["0", "3", "5"], 3


@pytest.mark.parametrize("make", [gpt2, vit, clip, convnet])
def test_whole_models(make, tmp_path):
    torch.manual_seed(0)
    base, inputs, targets, sites = make()
    base.eval()
    fields = {"target_modules": targets, "r": 2, "lora_alpha": 4}

    def run(model):
        out = model(**inputs)
        return out if torch.is_tensor(out) else out.logits if hasattr(out, "logits") else out.logits_per_image

    with torch.no_grad():
        plain = run(base)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**fields)).eval()
    assert len(model.roster.adapters["default"].methods) == sites
    with torch.no_grad():
        assert close(run(model), plain, 1e-6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):  # away from what the model gives now
        optimizer.zero_grad()
        loss = -(run(model) - plain).square().mean() - 1e-3 * run(model).mean()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    shake(model)
    with torch.no_grad():
        out = run(model)
        assert not close(out, plain, 1e-3)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.equal(run(again), out)
        with model.disable_adapter():
            assert torch.equal(run(model), plain)
        assert close(run(model.merge_and_unload()), out)
