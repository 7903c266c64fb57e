"""Methods whose site is the whole model, by the registry: every prompt-form method's examples on every sort of model.

The models and upstream's outputs come from golden/prompt/make.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import PeftModel, get_peft_model, registry
from tests.golden.prompt import make

METHODS = {name: m for name, m in registry.methods().items() if m.form == "prompt"}

EXAMPLES = [(name, i) for name, m in METHODS.items() for i in range(len(m.examples))]

every_method = pytest.mark.parametrize(("method", "example"), EXAMPLES, ids=[f"{n}-{i}" for n, i in EXAMPLES])

on = pytest.mark.parametrize


def config(method: str, example: int, model: str, **more):
    cls = METHODS[method]
    return cls.config_class(**{"task_type": make.MODELS[model][1], "seed": 6, **cls.examples[example], **more})


def randomise(model: nn.Module, name: str, seed: int = 3) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, m in model.roster.adapters[name].methods:
            for p in m.parameters():
                p.add_(torch.randn(p.shape, generator=rng).to(p) * 0.3)


def prompted(method: str, example: int, model: str = "llama_gqa", name: str = "default", **more) -> PeftModel:
    made = get_peft_model(make.build(model), config(method, example, model, **more), adapter_name=name).eval()
    randomise(made, name)
    return made


def arguments(model: str, loss: bool = True) -> dict:
    return {**make.inputs(model), **(make.labels(model) if loss or model == "t5" else {})}


@torch.no_grad()
def run(model: nn.Module, name: str, **more) -> torch.Tensor:
    return make.main_output(model(**arguments(name, loss=False), **more))


def loss_of(model: nn.Module, name: str) -> torch.Tensor:
    out = model(**arguments(name))
    found = getattr(out, "loss", None)
    return found if found is not None else make.main_output(out).square().mean()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=tolerance, rtol=tolerance)
