"""What other libraries import from here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..core.anatomy.walk import kind_of


def check_deepspeed_zero3_enabled() -> bool:
    """Whether transformers runs under ZeRO-3."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


@contextmanager
def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = 0, fwd_module: nn.Module | None = None
) -> Iterator[None]:
    """Within, ZeRO-3's parameters are whole."""
    if not check_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield


def dequantize_module_weight(module: nn.Module) -> nn.Parameter:
    """A layer's weight in floating point, native layout."""
    kind = kind_of(module)
    return nn.Parameter(kind.native(kind.read(module), module), requires_grad=False)


def dequantize_bnb_weight(weight: nn.Parameter, state: object = None) -> torch.Tensor:
    """A bitsandbytes weight in floating point; of 8-bit codes, the scales come from `state` or the weight. Others stay."""
    coded = getattr(weight, "quant_state", None)
    if coded is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, coded)
    scales = next((s for s in (getattr(weight, "SCB", None), getattr(state, "SCB", None)) if s is not None), None)
    found = getattr(weight, "CB", None)
    codes: torch.Tensor = weight.data if found is None else found
    if codes.dtype != torch.int8:
        return weight.data
    if scales is None:
        raise ValueError("These 8-bit codes come without scales (SCB).")
    return codes.to(scales.dtype) * (scales / 127)[:, None]


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Within, new modules are on the meta device."""
    with torch.device("meta"):
        yield
