"""Functions on models whose adapters were injected without a PeftModel around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .contract.managed import partitioned, split
from .core.acting.on_model import roster_of
from .core.acting.roster import Roster
from .core.injection.merge import set_active
from .core.injection.remove import delete_all, unload
from .core.model.functions import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from .core.model.peft_model import PeftModel

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]


def _roster(model: nn.Module) -> Roster:
    roster = roster_of(model)
    if roster is None:
        raise ValueError("This model has no adapters.")
    return roster


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: object = None) -> list[str] | None:
    """Remove an adapter; returns the adapters that act then. With the last one the model is the bare base model again.

    `prefix` and `layer_cls` are not needed to find it.
    """
    roster = _roster(model)
    delete_all(model, adapter_name)
    if not roster.adapters and not isinstance(model, PeftModel):
        unload(model)
        model.__dict__["peft_config"] = roster.configs  # empty; transformers takes it away
    return list(roster.chosen) or None


def set_adapter(
    model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: object = None
) -> None:
    """Activate one adapter or several together, and train exactly those."""
    set_active(model, adapter_name, inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Say which adapters train, whatever is active."""
    roster = _roster(model)
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    roster.known(names)
    for name in names:
        roster.set_trainable(name, requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Give an adapter's half-precision parameters fp32 values, as mixed-precision training needs."""
    roster = _roster(model)
    roster.known([adapter_name])
    for p in roster.adapters[adapter_name].parameters():
        if autocast_adapter_dtype and p.dtype in (torch.float16, torch.bfloat16):
            if split(p) or partitioned(p):
                raise ValueError(
                    f"Adapter {adapter_name!r} is split over processes, which keeps its dtype: cast it before."
                )
            p.data = p.data.float()
