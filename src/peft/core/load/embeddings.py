"""Whole embeddings in an adapter's file: written when asked for, and on loading a part of the adapter where they differ
from the base's, so that deleting the adapter brings the base's back."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ...contract.capabilities import Derives
from ...contract.managed import whole
from ...contract.method import Method
from ...errors import CheckpointError
from ..acting.roster import Adapter
from ..anatomy.embeddings import output_head, token_embeddings
from ..anatomy.ties import other_ends
from ..anatomy.walk import Place, walk
from ..files.header import Loaded
from ..files.keys import ROOT, root_of


def places_of_embeddings(model: nn.Module) -> Iterator[Place]:
    """Where the token embeddings and the head stand."""
    wanted = {id(m) for m in (token_embeddings(model), output_head(model)) if m is not None}
    return (p for p in walk(model) if p.owner is None and (id(p.held) in wanted or id(p.module) in wanted))


def embedding_tensors(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Input and output embeddings under the keys of upstream's files; prints their size."""
    out = {}
    for place in places_of_embeddings(model):
        leaf = ".base_layer.weight" if place.path in adapter.targeted else ".weight"
        weight = place.module.weight
        assert isinstance(weight, Tensor)
        out[root_of(adapter.config) + place.disk_path + leaf] = whole(weight)
    size = sum(t.numel() * t.element_size() for t in out.values())
    print(f"Saving {len(out)} whole embedding(s) with the adapter: {size / 2**20:.1f} MiB.")
    return out


def split_off(
    model: nn.Module, adapter: Adapter, loaded: Loaded, extra: list[str], ignore_sizes: bool = False
) -> tuple[list[str], list[str]]:
    """(the keys of `extra` that are no whole embeddings, the paths of embeddings that differ from the base's).

    The tensors of those come under the keys that the part of the adapter has for them; equal ones change nothing.
    """
    rest, named, tensors = list(extra), dict[str, Place](), loaded.tensors
    for place in places_of_embeddings(model) if extra else ():
        weight = place.module._parameters.get("weight")
        if weight is None:
            continue
        roots = dict.fromkeys((root_of(adapter.config), ROOT, ""))
        forms = [f"{r}{place.disk_path}{leaf}" for r in roots for leaf in (".weight", ".base_layer.weight")]
        for key in (k for k in forms if k in tensors):
            value = tensors[key]
            known = key if key in rest else ROOT + key
            if known not in rest:
                continue
            if value.shape != weight.shape:
                if ignore_sizes:
                    continue
                raise CheckpointError(
                    f"{key} holds {tuple(value.shape)}, this model's vocabulary gives {tuple(weight.shape)}: resize the "
                    "embeddings to the tokenizer the adapter was trained with (model.resize_token_embeddings)."
                )
            rest.remove(known)
            if not value.dtype.is_floating_point:
                raise CheckpointError(f"{loaded.source or 'The state dict'}: {key} holds {value.dtype}, not floats.")
            value = loaded.fetch([key])[key] if loaded.fetch is not None else value
            if not _equal(value, weight):
                named[key] = place
    ends: dict[str, Tensor] = {}
    for key, place in named.items():
        for end in [place, *other_ends(model, [place])]:
            ends.setdefault(end.path, tensors[key])
            if end is place:
                ends[end.path] = tensors[key]
    for key in named:
        tensors.pop(key)
    for place in walk(model) if ends else ():
        if place.path in ends:
            at = "base_layer.weight" if place.path in adapter.targeted else "weight"
            tensors[f"{root_of(adapter.config)}{place.disk_path}.{at}"] = ends[place.path]
    for path, method in zip(adapter.targeted, (m for _, m in adapter.own())):
        if path in ends and _is_of_the_weight(method):
            raise CheckpointError(
                f"{loaded.source or 'The state dict'} holds another embedding than this base's at {path}, of which "
                "the adapter is no added term: load the base that it was trained on."
            )
    return rest, list(ends)


def _is_of_the_weight(method: Method) -> bool:
    """Whether what the method changes depends on W: f(W), DoRA, factors derived from W, a copy of W."""
    derived = isinstance(method, Derives) and method.derives
    around = method.nested()[-1] is not method or hasattr(type(method), "weight")
    return derived or around or "weight" in method.replaced_names


def _equal(value: Tensor, weight: Tensor) -> bool:
    if weight.is_meta:
        return False
    same: bool = value.to(weight.device, weight.dtype).equal(whole(weight))
    return same
