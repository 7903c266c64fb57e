"""LoRA+: a larger learning rate for the last factor of the delta than for the first (arXiv 2402.12354)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from .factors import factors, methods

EMBEDDING_LR = 1e-6


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimizer with four groups: everything else at `lr`; embedding tables trained as such at
    `loraplus_lr_embedding` (1e-6); the last factors of all deltas and all vectors at `lr * loraplus_lr_ratio`, biases
    and norms among them without decay. `loraplus_weight_decay` (0) and the other arguments are the optimizer's.
    """
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    table_lr = kwargs.pop("loraplus_lr_embedding", EMBEDDING_LR)
    last = {id(p) for m in methods(model) for p in factors(m)[1]}
    tables = _tables(model)
    plain = _undecayed(model)
    groups: dict[str, list[nn.Parameter]] = {"first": [], "tables": [], "last": [], "last_undecayed": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) in tables:
            groups["tables"].append(p)
        elif id(p) in last or p.ndim == 1:
            groups["last_undecayed" if id(p) in plain or name.endswith("bias") else "last"].append(p)
        else:
            groups["first"].append(p)
    rates = {"first": lr, "tables": table_lr, "last": lr * loraplus_lr_ratio, "last_undecayed": lr * loraplus_lr_ratio}
    optimizer = optimizer_cls(
        [
            {"params": ps, "lr": rates[n], "weight_decay": 0.0 if n == "last_undecayed" else decay}
            for n, ps in groups.items()
        ],
        **kwargs,
    )
    if optimizer_cls.__module__.startswith("bitsandbytes"):
        import bitsandbytes

        bitsandbytes.optim.GlobalOptimManager.get_instance().override_config(groups["tables"], "optim_bits", 32)
    return optimizer


def _tables(model: nn.Module) -> set[int]:
    """Embedding tables that train whole: the base's, copies of them, and virtual tokens."""
    found = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for m in methods(model):
        if m.form == "prompt":
            found |= {id(p) for n, p in m.named_parameters() if n == "embedding.weight"}
        elif m.form == "replace" and m.geometry.indexed:
            found |= {id(p) for p in m.parameters()}
    return found


def _undecayed(model: nn.Module) -> set[int]:
    return {id(p) for m in model.modules() if "norm" in type(m).__name__.lower() for p in m.parameters(recurse=False)}
