"""What a model of language looks like: its config, stacks, attentions, caches, positions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Protocol, TypeGuard

import torch
from torch import Tensor, nn

from ...contract import offload
from ...signatures import arguments_of

CACHE = "past_key_values"
LAYER_CACHE = {CACHE, "cache", "past_key_value", "layer_past"}  # what attention modules call it; `cache` from 5.24


class EncoderDecoder(Protocol):
    """A model of an encoder and a decoder."""

    def get_encoder(self) -> nn.Module: ...
    def get_decoder(self) -> nn.Module: ...
    def prepare_decoder_input_ids_from_labels(self, labels: Tensor | None) -> Tensor: ...


def model_type(model: nn.Module) -> str | None:
    """What transformers calls models of this architecture; None for models that are none of transformers'."""
    return getattr(getattr(model, "config", None), "model_type", None)


def text_config(model: nn.Module) -> object:
    """The config of the part that reads text, where a model has several; None for models without a config."""
    config = getattr(model, "config", None)
    return getattr(config, "text_config", None) or config


def number(config: object, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise ValueError(f"This model's config has no {names[0]}: state it in the adapter's config.")


def is_encoder_decoder(model: nn.Module) -> TypeGuard[EncoderDecoder]:
    """Whether this is an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def token_and_cache_stacks(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(where input tokens enter, where a cache enters): one module, or an encoder and a decoder."""
    if is_encoder_decoder(model):
        return model.get_encoder(), model.get_decoder()
    stack = model
    inner: nn.Module | None = model
    while inner is not None:
        stack, names = inner, ("language_model", "decoder", getattr(inner, "base_model_prefix", ""))
        named = (getattr(inner, n, None) for n in names if n)
        children = [c for c in named if isinstance(c, nn.Module) and c is not stack]
        inner = next((c for c in children if "inputs_embeds" in arguments_of(type(c))), None)
    return stack, stack


def decoder_ids(model: nn.Module, labels: Tensor | None) -> Tensor:
    """The ids that an encoder-decoder model gives its decoder in training: the labels, shifted right."""
    assert is_encoder_decoder(model)
    return model.prepare_decoder_input_ids_from_labels(labels)


def layer_of(attention: nn.Module) -> int | None:
    """The number of an attention's layer, by which it finds its keys and values in a cache; None for other modules."""
    number = getattr(attention, "layer_idx", None)
    return number if isinstance(number, int) else None


def attentions(stack: nn.Module) -> Iterator[nn.Module]:
    """The modules that read and write the cache: they know their layer and hold no other that does."""
    found = [m for m in stack.modules() if layer_of(m) is not None and LAYER_CACHE & set(arguments_of(type(m)))]
    inner = {id(d) for m in found for d in m.modules() if d is not m}
    holders = {id(m) for m in found if any(id(d) in inner and d in found for d in m.modules() if d is not m)}
    return (m for m in found if id(m) not in holders)


def takes_prefix(model: nn.Module) -> str:
    """Why no keys and values can be put before this model's attention; "" where they can."""
    _, stack = token_and_cache_stacks(model)
    if not {CACHE, "cache"} & set(arguments_of(type(stack))) or next(attentions(stack), None) is None:
        return "its attention takes no keys and values from outside (no past_key_values), so a prefix has no way in"
    return ""


def shares_keys(attention: nn.Module) -> bool:
    """Whether this attention reads the keys and values of an earlier layer and keeps none of its own."""
    return bool(getattr(attention, "is_kv_shared_layer", False))


def key_value_shape(attention: nn.Module) -> tuple[int, int, int] | None:
    """(heads, width of a key, width of a value) as the layer keeps them; None where the module does not tell.

    The module is asked and not the config: layers of one model may differ (Gemma 4), and attributes of the same name
    mean different things in different models (multi-query Falcon).
    """

    def first(*names: str) -> int | None:
        found = (getattr(attention, n, None) for n in names)
        return next((v for v in found if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)

    key = first("qk_head_dim", "key_head_dim", "head_dim")
    value = first("v_head_dim") or key
    made = getattr(getattr(attention, "k_proj", None), "out_features", None)
    heads = made // key if isinstance(made, int) and key else first("num_key_value_heads", "num_kv_heads", "kv_heads")
    if heads is None and hasattr(attention, "kv_b_proj"):  # latent attention: keys and values of all heads are kept
        heads = first("num_heads")
    return (heads, key, value) if heads and key and value else None


def identity_inputs(stack: nn.Module, ids: Tensor | None, vectors: Tensor | None) -> Tensor | None:
    """What a stack with embeddings per layer looks up by token [rows, tokens, layers, width]; None where it has none."""
    make = getattr(stack, "get_per_layer_inputs", None)
    if make is None or not getattr(getattr(stack, "config", None), "hidden_size_per_layer_input", 0):
        return None
    if ids is not None:
        found: Tensor = make(ids)
        return found
    return make(None, vectors) if "inputs_embeds" in inspect.signature(make).parameters else None


def bidirectional(stack: nn.Module) -> bool:
    """Whether every token sees all others: an encoder."""
    causal = {bool(m.is_causal) for m in stack.modules() if isinstance(getattr(m, "is_causal", None), bool)}
    return causal == {False}


def floating(stack: nn.Module) -> torch.dtype:
    return next((p.dtype for p in stack.parameters() if p.is_floating_point()), torch.get_default_dtype())


def where(module: nn.Module) -> torch.device:
    """Where a layer computes: its keys and values must be there."""
    for m in module.modules():
        found = offload.home(m)
        if found is not None:
            return found
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def counting(stack: nn.Module) -> str:
    """What tells a stack its positions: "given" (position_ids), the "mask", only distances, or an own count."""
    tables = [(n, m) for n, m in stack.named_modules() if "position" in n.rsplit(".", 1)[-1] and "relative" not in n]
    if any("attention_mask" in arguments_of(type(m)) for _, m in tables):
        return "mask"
    if "position_ids" in arguments_of(type(stack)):
        return "given"
    return "own" if any(isinstance(m, nn.Embedding) for _, m in tables) else "distance"


def first_position(stack: nn.Module) -> int:
    """RoBERTa and its like number positions from behind the padding index."""
    for m in stack.modules():
        if hasattr(m, "create_position_ids_from_inputs_embeds"):
            return int(getattr(m, "padding_idx")) + 1  # noqa: B009
    return 0


def placeholder(model: nn.Module) -> int:
    """A token id that stands in for virtual tokens where a model looks at ids: none of its special ones."""
    special = set()
    for config in (getattr(model, "config", None), text_config(model)):
        for name, value in vars(config).items() if config is not None else ():
            if name.endswith(("token_id", "token_index")):
                special |= set(value) if isinstance(value, (list, tuple)) else {value}
    return next(i for i in range(len(special) + 1) if i not in special)
