"""Bringing a saved adapter into a model: read, plan, check every key, then commit. Heads and whole embeddings included."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..config import HUB_KWARGS
from . import checkpoint, inject, older
from .errors import CheckpointError
from .light import uninterrupted
from .mix import Adapter, Hub
from .targets import walk
from .vocabulary import room_for_tokens
from .weights import alone


@dataclasses.dataclass
class LoadResult:
    """What upstream's load functions return."""

    missing_keys: list[str]
    unexpected_keys: list[str]
    mismatched_keys: list[str] = dataclasses.field(default_factory=list)

    def __iter__(self) -> Iterator[list[str]]:
        return iter((self.missing_keys, self.unexpected_keys))


def read_adapter(
    model_id: Any, config: Any, key_mapping: dict[str, str] | None, strict: bool, kwargs: dict[str, Any]
) -> checkpoint.Loaded:
    hub = {k: v for k, v in kwargs.items() if k in HUB_KWARGS}
    loaded = checkpoint.read(model_id, subfolder=kwargs.get("subfolder"), strict=strict, config=config, **hub)
    if key_mapping:

        def renamed(key: str) -> str:
            body = key.removeprefix(checkpoint.ROOT)
            for pattern, replacement in key_mapping.items():
                body, n = re.subn(pattern, replacement, body)
                if n:
                    break
            return checkpoint.ROOT + body

        loaded.tensors = {renamed(k): v for k, v in loaded.tensors.items()}
    return loaded


def load_into(
    model: nn.Module, loaded: checkpoint.Loaded, name: str, *, strict: bool = True, autocast_adapter_dtype: bool = True
) -> LoadResult:
    """Plan, check every key, then commit: a file that does not fit leaves the model as it was."""
    with uninterrupted(), room_for_tokens(model, loaded):
        return _load_into(model, loaded, name, strict, autocast_adapter_dtype)


def _load_into(
    model: nn.Module, loaded: checkpoint.Loaded, name: str, strict: bool, autocast_adapter_dtype: bool
) -> LoadResult:
    prepare_head(model, loaded.config, loading=True)
    plan = inject.plan(model, loaded.config, name, init=False, autocast_adapter_dtype=autocast_adapter_dtype)
    adapter = plan.adapter()
    scratch = Hub()
    scratch.composites = plan.composites()
    pairs, missing, extra, tensors = fit(model, scratch, adapter, loaded.tensors)
    base, extra = base_tensors(model, adapter, tensors, extra)
    if strict:
        checkpoint.check_base(model, loaded, adapter)
        checkpoint.check_fit(adapter, pairs, missing, extra, loaded.source)
    elif missing or extra:
        warnings.warn(f"{loaded.source}: {len(missing)} tensors missing, {len(extra)} keys not used.", stacklevel=3)
    checkpoint.assign(pairs, adapter, adopt=loaded.owned)
    for p, value in base:
        p.data = alone(value.to(p.device, p.dtype))
    inject.commit(model, plan)
    return LoadResult(missing, extra)


def fit(
    model: nn.Module, hub: Hub, adapter: Adapter, tensors: dict[str, Tensor]
) -> tuple[dict[str, tuple[checkpoint.Slot, Tensor]], list[str], list[str], dict[str, Tensor]]:
    """`checkpoint.fit`, also for files made on an older layout of the model; and the tensors by the present one."""
    pairs, missing, extra = checkpoint.fit(hub, adapter, tensors)
    if extra:
        tensors = older.translate(model, adapter, tensors)
        pairs, missing, extra = checkpoint.fit(hub, adapter, tensors)
    return pairs, missing, extra, tensors


def base_tensors(
    model: nn.Module, adapter: Any, tensors: dict[str, Tensor], extra: list[str]
) -> tuple[list[tuple[nn.Parameter, Tensor]], list[str]]:
    """Whole embeddings that were saved along with the adapter: base weights, put back where their shape fits."""
    if not extra:
        return [], []
    root = checkpoint.root_of(adapter.config)
    places = {p.path: p for p in walk(model)}
    found, rest = [], []
    for key in extra:
        body = key.removeprefix(root).removesuffix(".weight").removesuffix(".base_layer")
        place = places.get(body)
        weight = getattr(place.module, "weight", None) if place is not None and key.endswith(".weight") else None
        if isinstance(weight, nn.Parameter) and key in tensors and weight.shape == tensors[key].shape:
            found.append((weight, tensors[key]))
        elif isinstance(weight, nn.Parameter) and key in tensors:
            raise CheckpointError(
                f"{key} holds {tuple(tensors[key].shape)}, this model's vocabulary gives {tuple(weight.shape)}: "
                "resize the embeddings to the tokenizer the adapter was trained with (model.resize_token_embeddings)."
            )
        else:
            rest.append(key)
    return found, rest


def embedding_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Input and output embeddings under the keys of upstream's files; prints their size."""
    wanted = {
        id(m)
        for get in ("get_input_embeddings", "get_output_embeddings")
        if (m := getattr(model, get, lambda: None)()) is not None
    }
    out = {}
    for place in walk(model):
        if id(place.held) in wanted or id(place.module) in wanted:
            leaf = ".base_layer.weight" if place.adapted is not None else ".weight"
            out[checkpoint.ROOT + place.stem + leaf] = place.module.weight.detach()  # type: ignore[union-attr,operator]
    size = sum(t.numel() * t.element_size() for t in out.values())
    print(f"Saving {len(out)} whole embedding(s) with the adapter: {size / 2**20:.1f} MiB.")
    return out


# -- task heads -----------------------------------------------------------------------------------------------------------
HEADS_BY_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def prepare_head(model: nn.Module, config: Any, loading: bool = False) -> None:
    """Newly initialised heads train and are saved with the adapter, for every task type that has one."""
    task = getattr(config.task_type, "value", config.task_type)
    if task not in HEADS_BY_TASK or not hasattr(config, "modules_to_save"):
        return
    present = [n for n in HEADS_BY_TASK[task] if any(name.split(".")[-1] == n for name, _ in model.named_modules())]
    named = config.modules_to_save
    if named is None:
        config.modules_to_save = present or None
    elif loading:  # upstream's files name every head a task may have
        config.modules_to_save = [n for n in dict.fromkeys(named) if n in present or n not in HEADS_BY_TASK[task]]
    else:
        config.modules_to_save = [*named, *(n for n in present if n not in named)]
