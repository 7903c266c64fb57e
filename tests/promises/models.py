"""What the tests of the promises share: a tiny Llama with adapters that have an effect, every method on a linear layer.

The promises go by number: what users of such libraries suffer, and what may not happen here. Each test fails without
the property it names. Those about one layer alone (2, 13, 15, 18, 32, 33) are among the laws. The files of this folder
are groups of them: files (1, 20 to 25, 30), results (3 to 6, 8, 31, 34), leaving (35), training (7, 10, 11, 14, 36),
targets (9) and switching (12, 26); bad input and the announced figures go without numbers.
"""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, PeftModel, get_peft_model, registry
from tests.helpers.cells import Cell, randomise, refusal

TOKENS = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(0))


def llama(layers: int = 2, seed: int = 0, **more) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(**{**sizes, "num_key_value_heads": 2, "num_hidden_layers": layers, **more})
    ).eval()


def lora(**more) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **more}
    )


def adapted(seed: int = 1, names: tuple[str, ...] = ("default",), base=None, **more) -> PeftModel:
    """A tiny Llama with adapters that have an effect."""
    torch.manual_seed(seed)
    model = get_peft_model(base if base is not None else llama(), lora(**more), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora(**more))
    for i, name in enumerate(names):
        randomise(model, name, seed + i)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, **more) -> torch.Tensor:
    return model(input_ids=TOKENS, **more).logits


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def linear_cells() -> list[Cell]:
    """Every method's every example on a plain linear layer."""
    found = [
        Cell(name, dict(config), "linear", "sequence")
        for name, m in registry.methods().items()
        if m.form != "prompt"
        for config in m.examples
    ]
    return [c for c in found if refusal(c) is None]


CELLS = linear_cells()

each_method = pytest.mark.parametrize("cell", CELLS, ids=[c.id for c in CELLS])


def rename_keys(folder, old: str, new: str) -> None:
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as f:
        header = f.metadata()
    save_file({k.replace(old, new): v for k, v in load_file(path).items()}, path, metadata=header)


PROMPTS = [
    pytest.param(m.config_class, dict(config), id=f"{name}-{i}")
    for name, m in registry.methods().items()
    if m.form == "prompt"
    for i, config in enumerate(m.examples)
]


def prompted(cls, config) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(llama(), cls(**{"task_type": "CAUSAL_LM", **config}))
    randomise(model, "default", 2)
    return model.eval()


def call(model: PeftModel, **more):
    needed = (
        {"task_ids": torch.zeros(2, dtype=torch.long)} if hasattr(model.peft_config["default"], "num_tasks") else {}
    )
    return model(input_ids=TOKENS, **needed, **more)
