"""What the tests of selective methods share: a small Llama whose every part can be named, bits, training steps."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

IDS = torch.tensor([[1, 3, 17, 9, 2, 5, 30, 1], [9, 9, 3, 4, 6, 5, 2, 0]])


def llama(tied=False, vocab=40, state=None, bias=True):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=bias,
        tie_word_embeddings=tied,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config).eval()
    if state is not None:
        model.load_state_dict({k: v for k, v in state.items() if not (tied and k == "lm_head.weight")}, strict=not tied)
    return model


def shake(model, name="default", by=0.3, seed=1):
    torch.manual_seed(seed)
    for p in model.adapter_parameters(name):
        p.data += by * torch.randn_like(p)
    return model


def bits(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(module, before):
    return all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def train(model, loss, steps=3, rate=0.1):
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(model).backward()
        optimiser.step()


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
