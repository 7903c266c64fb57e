"""Small mixtures of experts, with LoRA on their stacked weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model

from .versions import TORCH

transformers = pytest.importorskip("transformers")

BOTH = ["experts.gate_up_proj", "experts.down_proj"]

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "intermediate_size": 24,
}

MODELS = {
    "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOss", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "llama4": (
        "Llama4",
        {
            "intermediate_size_mlp": 24,
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
        },
    ),
}


IDS = torch.arange(24).reshape(2, 12) * 5 % 64


def base(name: str, implementation: str = "eager") -> nn.Module:
    family, more = MODELS[name]
    config = getattr(transformers, f"{family}{'Text' if name == 'llama4' else ''}Config")(**SIZES, **more)
    config._attn_implementation, config._experts_implementation = "eager", implementation
    if implementation == "grouped_mm" and TORCH < (2, 9):
        pytest.skip("transformers' grouped products need torch 2.9")
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    rng = torch.Generator().manual_seed(0)
    for n, p in sorted(model.named_parameters()):
        if p.dim() > 1 or "norm" not in n:
            p.data = torch.randn(p.shape, generator=rng) * 0.3
    return model.eval()


def adapted(model: nn.Module, *names: str, **fields) -> PeftModel:
    config = {"r": 2, "target_modules": [], "target_parameters": BOTH, "init_lora_weights": False, **fields}
    for i, name in enumerate(names or ("default",)):
        torch.manual_seed(7 + i)
        if i == 0:
            model = get_peft_model(model, LoraConfig(**config), adapter_name=name)
        else:
            model.add_adapter(name, LoraConfig(**config))
    return model.eval()
