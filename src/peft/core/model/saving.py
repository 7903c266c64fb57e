"""A model's adapters as files: which folder each goes to, and as what it is written; and the names in upstream's state dict."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...config import PeftConfig
from ...contract.managed import settle
from ...errors import CheckpointError
from ...remote import PUSH_KWARGS, push_folder, refuse_others
from ..files.adapter_files import save
from ..files.sharded import Gathered, first_of, together, wait_for_all
from ..load.embeddings import embedding_tensors
from ..report.card import write_card
from .tuner import Tuner

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


SAVE_KWARGS = ("max_shard_size", "save_function", "state_dict")  # an adapter is one file, written by this library


def gathered_among(kwargs: dict[str, Any]) -> Mapping[str, Tensor] | None:
    """`state_dict` among the further arguments of `save_pretrained`; TypeError for those that nothing takes."""
    refuse_others("save_pretrained()", kwargs, SAVE_KWARGS)
    return kwargs.get("state_dict")


def push_adapters(
    save_pretrained: Callable[..., object], config: PeftConfig, repo_id: str, kwargs: dict[str, Any]
) -> CommitInfo:
    """Upload adapters with a model card. tags: further ones for the card; what else saving and the hub take."""
    named = [p for p in inspect.signature(save_pretrained).parameters if p not in ("save_directory", "kwargs")]
    saving = {k: kwargs.pop(k) for k in (*named, *SAVE_KWARGS) if k in kwargs}
    tags = kwargs.pop("tags", None) or ()
    refuse_others("push_to_hub()", kwargs, (*PUSH_KWARGS, *named, *SAVE_KWARGS, "tags"))

    def write(folder: str) -> None:
        save_pretrained(folder, **{"model_card": True, **saving})
        if tags:
            write_card(config, folder, tags)

    return push_folder(write, repo_id, **kwargs)


def save_adapters(
    tuner: Tuner,
    names: Sequence[str],
    directory: str,
    *,
    safe: bool,
    embeddings: bool,
    plain_pairs: bool,
    gathered: Gathered | None,
    main: bool = True,
) -> Iterator[str]:
    """Write the named adapters, yielding their folders: `default` at the top, the others in folders of their names.

    embeddings: also the whole embeddings. plain_pairs: see `as_plain_pairs`. gathered: where to find tensors that are
    split over processes. main: whether this process may write; where all have to take part, the first that may does.
    """
    settle(m for n in names for _, m in tuner.roster.adapters[n].methods)
    kept = [p for n in names for p in tuner.roster.adapters[n].parameters()] if gathered is None else []
    tables = list(tuner.model.parameters()) if embeddings else []
    all_take_part = together([*kept, *tables])
    if all_take_part and gathered is not None:
        raise CheckpointError(
            "The embeddings are split over processes, and state_dict holds the adapters' tensors alone: leave it out and "
            "call save_pretrained on all processes."
        )
    if not main and not all_take_part:
        return
    writes = first_of(main) if all_take_part else main
    try:
        written = as_plain_pairs if plain_pairs else as_it_is
        for name in names:
            folder = os.path.join(directory, name) if name != "default" else directory
            with written(tuner, name) as saved:
                extra = embedding_tensors(tuner.model, tuner.roster.adapters[saved]) if embeddings else {}
                save(tuner.model, tuner.roster, saved, folder, safe=safe, extra=extra, gathered=gathered, writes=writes)
            if writes:
                yield folder
    finally:
        if all_take_part:
            wait_for_all()  # whoever goes on may read what the one has written


@contextmanager
def as_it_is(tuner: Tuner, name: str) -> Iterator[str]:
    """The adapter itself."""
    yield name


@contextmanager
def as_plain_pairs(tuner: Tuner, name: str) -> Iterator[str]:
    """A copy of an adapter as plain pairs of factors, for as long as it takes to save it."""
    copied = f"{name} converted"
    tuner.add_weighted_adapter([name], [1.0], copied, "cat")
    try:
        yield copied
    finally:
        tuner.delete_adapter(copied)


def prompts_below(state_dict: dict[str, Tensor], prefix: str) -> None:
    """The names of this library in a state dict of upstream's, in place, where it holds prompts.

    Upstream keeps them beside the base model, whose names lack the step of the tuner then.
    """
    if any(k.startswith(f"{prefix}prompt_encoder.") for k in state_dict):
        for name in [k for k in state_dict if k.startswith(prefix)]:
            body, value = name.removeprefix(prefix), state_dict.pop(name)
            if not body.startswith("word_embeddings."):  # the base's, once more
                state_dict[f"{prefix}base_model.model.{body.removeprefix('base_model.')}"] = value
