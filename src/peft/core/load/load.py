"""Bringing a saved adapter into a model: read, plan, check every key, then commit. Heads and whole embeddings included."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ...config import PeftConfig
from ...contract.cheap_modules import made_on_the_cpu, uninterrupted
from ...errors import CheckpointError
from ...remote import CODE_KWARGS, HUB_KWARGS, PLACING_KWARGS, refuse_others
from ..acting.roster import Adapter, Roster
from ..anatomy.embeddings import output_head, token_embeddings
from ..anatomy.heads import prepare_head
from ..anatomy.walk import walk
from ..files.adapter_files import read
from ..files.header import Loaded, check_base
from ..files.keys import ROOT, FileTensor, assign, check_fit, few, fit, root_of
from ..files.older_keys import translate
from ..files.tensors import alone
from ..injection.commit import commit
from ..injection.plan import plan
from .room_for_tokens import room_for_tokens

NAMED = ("dtype", "ignore_mismatched_sizes", "subfolder", "torch_dtype")  # what else a caller may say of a file


@dataclasses.dataclass
class LoadResult:
    """What upstream's load functions return."""

    missing_keys: list[str]
    unexpected_keys: list[str]
    mismatched_keys: list[str] = dataclasses.field(default_factory=list)

    def __iter__(self) -> Iterator[list[str]]:
        return iter((self.missing_keys, self.unexpected_keys))


@made_on_the_cpu()
def read_adapter(
    model_id: str | os.PathLike[str],
    config: PeftConfig | None,
    key_mapping: dict[str, str] | None,
    strict: bool,
    kwargs: Mapping[str, Any],
) -> Loaded:
    """Both files of an adapter, the keys renamed by the first pattern of `key_mapping` that a key holds."""
    refuse_others("Loading an adapter", kwargs, (*HUB_KWARGS, *CODE_KWARGS, *PLACING_KWARGS, *NAMED))
    if "torch_dtype" in kwargs or "dtype" in kwargs:
        warnings.warn(
            "A dtype says nothing to an adapter that is loaded: autocast_adapter_dtype decides between fp32 and the base's.",
            stacklevel=3,
        )
    remote = {k: v for k, v in kwargs.items() if k in HUB_KWARGS}
    loaded = read(os.fspath(model_id), subfolder=kwargs.get("subfolder"), strict=strict, config=config, **remote)
    if key_mapping:

        def renamed(key: str) -> str:
            body = key.removeprefix(ROOT)
            for pattern, replacement in key_mapping.items():
                body, n = re.subn(pattern, replacement, body)
                if n:
                    break
            return ROOT + body

        loaded.tensors = {renamed(k): v for k, v in loaded.tensors.items()}
    return loaded


@made_on_the_cpu()
def load_into(
    model: nn.Module, loaded: Loaded, name: str, *, strict: bool = True, autocast_adapter_dtype: bool = True
) -> LoadResult:
    """Plan, check every key, then commit: a file that does not fit leaves the model as it was."""
    with uninterrupted(), room_for_tokens(model, loaded):
        return _load_into(model, loaded, name, strict, autocast_adapter_dtype)


def _load_into(model: nn.Module, loaded: Loaded, name: str, strict: bool, autocast_adapter_dtype: bool) -> LoadResult:
    prepare_head(model, loaded.config, loading=True)
    # what a file may lack starts as a fresh adapter would: memory that nobody wrote is never used
    planned = plan(model, loaded.config, name, init=not strict, autocast_adapter_dtype=autocast_adapter_dtype)
    adapter = planned.adapter()
    scratch = Roster()
    scratch.composites = planned.composites()
    pairs, missing, extra, tensors = fit_any_layout(model, scratch, adapter, loaded.tensors)
    base, extra = base_tensors(model, adapter, tensors, extra)
    if strict:
        check_base(model, loaded, adapter)
        check_fit(adapter, pairs, missing, extra, loaded.source)
    elif missing or extra:
        warnings.warn(
            f"{loaded.source}: {len(missing)} tensors missing, {len(extra)} keys not used. Missing, so they start fresh: "
            f"{few(missing)}. Not used: {few(extra)}.",
            stacklevel=3,
        )
    assign(pairs, adapter, adopt=loaded.owned)
    for p, value in base:
        p.data = alone(value.to(p.device, p.dtype))
    commit(model, planned)
    return LoadResult(missing, extra)


def fit_any_layout(
    model: nn.Module, roster: Roster, adapter: Adapter, tensors: dict[str, Tensor]
) -> tuple[dict[str, tuple[FileTensor, Tensor]], list[str], list[str], dict[str, Tensor]]:
    """`fit`, also for files made on an older layout of the model; and the tensors by the present one."""
    pairs, missing, extra = fit(roster, adapter, tensors)
    if extra:
        tensors = translate(model, adapter, tensors)
        pairs, missing, extra = fit(roster, adapter, tensors)
    return pairs, missing, extra, tensors


def base_tensors(
    model: nn.Module, adapter: Adapter, tensors: dict[str, Tensor], extra: list[str]
) -> tuple[list[tuple[nn.Parameter, Tensor]], list[str]]:
    """Whole embeddings that were saved along with the adapter: base weights, put back where their shape fits."""
    if not extra:
        return [], []
    root = root_of(adapter.config)
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
    wanted = {id(m) for m in (token_embeddings(model), output_head(model)) if m is not None}
    out = {}
    for place in walk(model):
        if id(place.held) in wanted or id(place.module) in wanted:
            leaf = ".base_layer.weight" if place.adapted is not None else ".weight"
            weight = place.module.weight
            assert isinstance(weight, Tensor)
            out[ROOT + place.disk_path + leaf] = weight.detach()
    size = sum(t.numel() * t.element_size() for t in out.values())
    print(f"Saving {len(out)} whole embedding(s) with the adapter: {size / 2**20:.1f} MiB.")
    return out
