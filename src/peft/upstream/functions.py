"""Functions that other libraries import from upstream's `peft.utils`, stated on this library's layers."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ..contract import managed
from ..contract.composition import by_form
from ..contract.method import Method
from ..contract.tree import AdapterContainer, Composite
from ..core.acting.on_model import base_of
from ..core.adapted.layer import Adapted
from ..errors import CheckpointError


# -- the base model under the adapters --------------------------------------------------------------------------------------
def base_tensors(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, str]]:
    """(name in the bare base model, what holds it, its name there) of all its saved state, seen through the wrappers."""
    inner = module
    while isinstance(inner, (Adapted, Composite)):
        inner = inner.base_layer
    for name, p in inner._parameters.items():
        if p is not None:
            yield path + name, inner, name
    for name, b in inner._buffers.items():
        if b is not None and name not in inner._non_persistent_buffers_set:
            yield path + name, inner, name
    for name, child in inner._modules.items():
        if child is not None and not isinstance(child, (AdapterContainer, Method)):
            yield from base_tensors(child, f"{path}{name}.")


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base model's state dict, under the names it has without adapters."""
    return {n: managed.held(owner, leaf).detach() for n, owner, leaf in base_tensors(base_of(model))}


def set_base_model_state_dict(
    model: nn.Module, state_dict: dict[str, Tensor], strict: bool = True
) -> _IncompatibleKeys:
    """Load values into the base model under the adapters; checked before anything changes."""
    base = base_of(model)
    places = {n: (owner, leaf) for n, owner, leaf in base_tensors(base)}
    own = {n: managed.held(*place) for n, place in places.items()}
    missing, extra = [n for n in own if n not in state_dict], [n for n in state_dict if n not in own]
    wrong = [n for n, t in own.items() if n in state_dict and state_dict[n].shape != t.shape]
    if wrong or (strict and (missing or extra)):
        raise CheckpointError(
            f"The state dict does not fit the base model: missing {missing[:5]}, unknown {extra[:5]}, other shape {wrong[:5]}."
        )
    for n, place in places.items():
        if n in state_dict:
            managed.write(*place, state_dict[n])
    return _IncompatibleKeys(missing, extra)


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, name below the parent) of a module's path."""
    path, _, name = key.rpartition(".")
    return model.get_submodule(path), model.get_submodule(key), name


# -- precision and sharding ---------------------------------------------------------------------------------------------------
def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen floating parameters in `dtype`, trained ones in fp32; before they are split over processes."""
    pieces = [n for n, p in model.named_parameters() if managed.split(p) or managed.partitioned(p)]
    if pieces:
        raise ValueError(
            f"{pieces[0]} is split over processes, which keeps its dtype: cast the model before sharding it."
        )
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(torch.float32 if p.requires_grad else dtype)


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """FSDP units: each transformer block, and each adapter's method, whose parameters train apart from the frozen rest.

    The environment's FSDP_TRANSFORMER_CLS_TO_WRAP names the blocks; else the model's `_no_split_modules`.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    wanted = {n for n in named.split(",") if n} or {
        n for m in model.modules() for n in getattr(m, "_no_split_modules", None) or ()
    }
    present = {type(m).__name__: type(m) for m in model.modules()}
    absent = sorted(wanted - set(present)) if named else []
    if absent:
        raise ValueError(f"FSDP_TRANSFORMER_CLS_TO_WRAP names {', '.join(absent)}, which this model does not have.")
    blocks = functools.partial(
        transformer_auto_wrap_policy, transformer_layer_cls={present[n] for n in wanted if n in present}
    )
    inner = {id(n) for m in model.modules() if isinstance(m, Method) for n in m.nested() if n is not m}
    own = functools.partial(
        lambda_auto_wrap_policy, lambda_fn=lambda m: id(m) not in inner and _trains_alone(m)
    )  # what a method wraps is read inside its calls
    return functools.partial(_or_policy, policies=[own, blocks])


def _trains_alone(module: nn.Module) -> bool:
    """What a `replace` or a prompt gives is used outside its calls: it stays in the unit of what surrounds it."""
    if not isinstance(module, Method):
        return False
    before, _, added, after = by_form([module])
    if not (before or added or after):
        return False
    parameters = list(module.parameters())
    return bool(parameters) and all(p.requires_grad for p in parameters)


# -- small tensor functions -----------------------------------------------------------------------------------------------------
def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Decoder inputs from labels: one place to the right, led by the start token, ignored labels (-100) as padding."""
    start = input_ids.new_full((input_ids.shape[0], 1), decoder_start_token_id)
    shifted = torch.cat([start, input_ids[:, :-1]], 1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def bloom_model_postprocess_past_key_value(past_key_values: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Prefixes [2·layers, batch, heads, tokens, dim] as Bloom's old cache: keys [batch·heads, dim, tokens] per layer.

    The keys' entries are laid out token by token, not transposed per head: that is what trained prefixes rely on.
    """
    keys, values = torch.cat(past_key_values).chunk(2)
    layers, batch, heads, tokens, dim = keys.shape
    keys = keys.transpose(2, 3).reshape(layers, batch * heads, dim, tokens)
    return tuple(zip(keys, values.flatten(1, 2), strict=True))


def starcoder_model_postprocess_past_key_value(past_key_values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Prefixes [2, batch, heads, tokens, dim] as StarCoder's old cache of one shared head: [batch, tokens, 2·dim]."""
    return tuple(k[:, :, 0].permute(1, 2, 0, 3).flatten(-2) for k in past_key_values)
