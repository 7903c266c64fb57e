"""Getting a quantised model ready for training adapters on it.

Nothing is cast: adapters keep fp32 masters of their own, norms compute in the dtype the model was loaded in, and
upcasting what is left of the floating parameters costs gigabytes on a large model (embeddings and head alone). So this
adds 0 bytes to the parameters; what it adds to a forward is one small tensor per call, the marker of a gradient.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from ..anatomy.embeddings import ask_gradients_of_embeddings
from ..anatomy.walk import kind_of


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, object] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze the model, bring its layers into the form that has a backward, and switch checkpointing on.

    use_gradient_checkpointing: recompute blocks in backward; gradients are then asked of the embeddings' output, since
    reentrant checkpointing drops blocks whose input needs none. gradient_checkpointing_kwargs: passed to
    `model.gradient_checkpointing_enable`; use_reentrant=False is the default here. auto_clear_cache: give freed memory
    back to the accelerator afterwards; nothing here is held in a cycle, so no garbage collection is needed for that.
    """
    for param in model.parameters():
        param.requires_grad_(False)
    for module in model.modules():
        kind_of(module).trainable(module)
    if use_gradient_checkpointing:
        _checkpoint(model, dict(gradient_checkpointing_kwargs or {}))
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model


def _checkpoint(model: nn.Module, options: Mapping[str, object]) -> None:
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise ValueError(
            f"{type(model).__name__} has no gradient checkpointing; pass use_gradient_checkpointing=False."
        )
    if not ask_gradients_of_embeddings(model):
        raise AttributeError(
            f"{type(model).__name__} has no get_input_embeddings(), of whose output gradients can be asked; pass "
            "use_gradient_checkpointing=False."
        )
    if "gradient_checkpointing_kwargs" in inspect.signature(enable).parameters:
        enable(gradient_checkpointing_kwargs={"use_reentrant": False, **options})
        return
    if options:
        warnings.warn(
            f"{type(model).__name__}.gradient_checkpointing_enable takes no options; {options} is not used.",
            stacklevel=3,
        )
    enable()
