"""Base models and adapters that are the same in both libraries: seeded by names, never by the order of creation."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(
    hidden: int = 512, layers: int = 4, inner: int = 1376, heads: int = 8, vocabulary: int = 2048, dtype: Any = None
) -> nn.Module:
    """A frozen causal language model of Llama's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(dtype or torch.float32)
    return model.requires_grad_(False).train()


class Stack(nn.Module):
    """Linear layers in a row, with a gate between them that keeps the values in range."""

    def __init__(self, widths: list[int], dtype: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))
        self.to(dtype or torch.float32).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ALL:
            setattr(self, name, nn.Linear(width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        for name in ALL:
            x = x + getattr(self, name)(x)
        return nn.functional.layer_norm(x, x.shape[-1:])


class Blocks(nn.Module):
    """Blocks of seven square layers: what injection walks over, without the cost of a real model's forward."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def lora(r: int = 16, **settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": r, "lora_alpha": 2 * r, "target_modules": list(ALL), **settings})


def noise(key: str, shape: Any, scale: float) -> Tensor:
    """Values that depend on the key alone."""
    rng = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randn(tuple(shape), generator=rng) * scale


def randomise(model: nn.Module, adapter: str = "default", scale: float = 0.02, salt: str = "") -> nn.Module:
    """Give an adapter the values that its file's keys say. Vectors stay near where they start."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=adapter)
    new = {}
    for key, value in state.items():
        fresh = noise(salt + key, value.shape, scale)
        new[key] = (fresh if value.dim() > 1 else value.detach().float() + 10 * scale * fresh).to(value.dtype)
    set_peft_model_state_dict(model, new, adapter_name=adapter)
    return model


def gradients(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The gradients under the names that their parameters have on disk, which both libraries share.

    Each gradient is put where its parameter's value is, and the adapter is read as if to save it.
    """
    from peft import get_peft_model_state_dict

    trained = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    values = [p.data for p in trained]
    try:
        for p in trained:
            p.data = p.grad.clone()  # type: ignore[union-attr]
        return {k: v.detach().clone() for k, v in get_peft_model_state_dict(model, adapter_name=adapter).items()}
    finally:
        for p, value in zip(trained, values, strict=True):
            p.data = value
            p.grad = None


def with_effect(model: nn.Module, **outputs: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Outputs, and what the adapter changes in each: without it, two libraries could agree on doing nothing."""
    found = {}
    for name, run in outputs.items():
        with torch.no_grad():
            found[name] = run()
            with model.disable_adapter():
                found[f"effect on {name}"] = found[name] - run()
    return found


def floor(base: nn.Module) -> nn.Module:
    """The frozen model as it must run at least: gradients flow through all layers down to the embedded input."""
    model = copy.deepcopy(base)
    model.enable_input_require_grads()
    return model


def step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """Forward and backward on a batch of token ids."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        for p in trained:
            p.grad = None

    return run


def tokens(batch: int, length: int, vocabulary: int = 2048) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def step_outputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Logits, what the adapter changes in them, and its gradients."""
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    logits = out.logits.detach()
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids).logits
    effect = {"effect": logits - base} if logits.dtype == torch.float32 else {}  # below half precision's steps else
    return {"logits": logits, **effect, **gradients(model)}
