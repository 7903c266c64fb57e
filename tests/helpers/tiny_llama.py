"""A Llama of two small layers, a LoRA config with an effect, and the logits on fixed tokens."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig

TOKENS = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(0))


def llama(seed: int = 0, **more) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(**{**sizes, "num_key_value_heads": 2, "num_hidden_layers": 2, **more})
    return LlamaForCausalLM(config).eval()


def lora(**more) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **more})


@torch.no_grad()
def logits(model: nn.Module, **more) -> torch.Tensor:
    return model(input_ids=TOKENS, **more).logits
