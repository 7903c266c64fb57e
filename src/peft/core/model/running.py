"""What holds for one call of a model: an adapter per row, a task per row, no adapter; and how its arguments are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..acting.mix import Mix
from ..acting.rows import Rows
from ..adapted.layer import adapted_layers
from .tuner import Tuner


# -- arguments --------------------------------------------------------------------------------------------------------------
def by_name(
    names: Sequence[str], args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """A call's arguments with those after the first two by name. `names`: the order in which a head takes them."""
    more = dict(zip(names, args[2:], strict=False))
    if len(args) - 2 > len(names) or set(more) & set(kwargs):
        raise TypeError(f"forward() takes {', '.join(names)} after the first two by position, each once.")
    return args[:2], {**{k: v for k, v in more.items() if v is not None}, **kwargs}


def refuse_string(names: Sequence[str]) -> None:
    """Its letters would be taken for names."""
    if isinstance(names, str):
        raise TypeError(f"adapter_names={names!r}: expected a list of names, one per row of the batch.")


def check_rows(names: Sequence[str], args: Sequence[object], kwargs: Mapping[str, object]) -> list[Tensor]:
    """The tensors among the inputs, whose first axis must be as long as `names`."""
    refuse_string(names)
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    if tensors and len(names) != tensors[0].shape[0]:
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and {tensors[0].shape[0]} respectively."
        )
    return tensors


def for_copies(names: Sequence[str], args: Sequence[object], kwargs: Mapping[str, Any]) -> Sequence[str]:
    """The names of the rows that `generate` runs: each as often as its row has beams, or sequences to return."""
    check_rows(names, args, kwargs)
    beams = kwargs.get("num_beams") or getattr(kwargs.get("generation_config"), "num_beams", 1) or 1
    copies = beams if beams > 1 else kwargs.get("num_return_sequences") or 1
    return [n for n in names for _ in range(copies)] if copies > 1 else names


# -- within a call ----------------------------------------------------------------------------------------------------------
@contextmanager
def rows(
    tuner: Tuner, names: Sequence[str] | None, args: Sequence[object], kwargs: Mapping[str, object]
) -> Iterator[None]:
    """Within, each row of the batch runs with the adapter of its name."""
    if names is None:
        yield
        return
    roster = tuner.roster
    refuse_string(names)
    roster.known(names)
    tensors = check_rows(names, args, kwargs)
    if any(layer.merged for layer in adapted_layers(tuner)):
        raise ValueError("Adapters are merged into the base: call unmerge_adapter() before mixing adapters in a batch.")
    tokens = None
    if tensors and tensors[0].dim() >= 2 and not tensors[0].is_nested and kwargs.get("pixel_values") is None:
        tokens = int(tensors[0].shape[1])
    with roster.using(Mix((), Rows(names, tokens)) if roster.enabled else Mix()):
        yield


@contextmanager
def tasks(tuner: Tuner, task_ids: Tensor | None) -> Iterator[None]:
    """Within, each row of the batch belongs to the task of its id."""
    if task_ids is None:
        yield
        return
    roster = tuner.roster
    with roster.using(dataclasses.replace(roster.mix, tasks=task_ids)):
        yield


@contextmanager
def call(
    tuner: Tuner,
    names: Sequence[str] | None = None,
    task_ids: Tensor | None = None,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
) -> Iterator[None]:
    """One call of the model: from here on nobody else's switching or loading changes what it computes with.

    names: an adapter per row of the batch; task_ids: a task per row.
    """
    with tuner.roster.gate.call(), rows(tuner, names, args, kwargs or {}), tasks(tuner, task_ids), tuner.steady():
        yield


@contextmanager
def disabled(tuner: Tuner) -> Iterator[None]:
    """Within, no adapter acts in this call; merged ones are taken out of the base for as long as anybody is within, and
    act unmerged for all others."""
    roster = tuner.roster
    paused = tuner.pause_merging()
    try:
        with roster.using(Mix(), enabled=False, held=True):
            yield
    finally:
        if paused:
            tuner.resume_merging()
