"""Saving and loading: `adapter_config.json` and `adapter_model.safetensors` in upstream's layout.

Keys are written structurally, from the places the methods hang at, so an adapter's name never matters. The header of
the weights file carries the config and the base model's fingerprint; files are written aside and renamed, weights
first, so that a reader sees the old adapter or the new one. Loading checks everything before it changes anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ...config import CONFIG_NAME, PeftConfig, require_method
from ...contract.cheap_modules import uninterrupted
from ...errors import CheckpointError, about_a_file, printable
from ...local_files import replace_files
from ...remote import find_file
from ..acting.roster import Roster
from . import sharded
from .bin_files import write_bin
from .header import FREE, Loaded, fill_base, fingerprint, fingerprint_in, object_in
from .keys import few, state_dict_of
from .tensors import Fetch, Weights, alone, apart, not_finite, read_weights, write_weights

WEIGHTS_NAME = "adapter_model.bin"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"


@uninterrupted()
def save(
    model: nn.Module,
    roster: Roster,
    name: str,
    folder: str | os.PathLike[str],
    *,
    safe: bool = True,
    extra: dict[str, Tensor] | None = None,
    gathered: sharded.Gathered | None = None,
    writes: bool = True,
) -> None:
    """Write one adapter: two files, no network. What is split over processes is put together, by all of them; those
    that do not write end there."""
    adapter = roster.adapters[name]
    config = dataclasses.replace(adapter.config)
    config.inference_mode = True
    fill_base(config, model)
    found = {**(extra or {}), **state_dict_of(roster, name, gathered, whole=True)}
    if not writes:
        return
    os.makedirs(folder, exist_ok=True)
    header = {
        "format": "pt",
        "peft_config": json.dumps(config.to_json_dict(), sort_keys=True),
        "peft_base": json.dumps(fingerprint(model, adapter), sort_keys=True),
    }

    def weights(path: str) -> None:
        if safe:
            write_weights(found, path, header)
        else:
            write_bin({k: alone(t) for k, t in apart(found).items()}, path, header)

    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if safe else (WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME)
    replace_files(os.fspath(folder), {names[0]: weights, CONFIG_NAME: config.write_json}, instead_of=names[1:])


def read(
    model_id: str,
    *,
    subfolder: str | None = None,
    strict: bool = True,
    config: PeftConfig | None = None,
    two_steps: bool = False,
    **remote: object,
) -> Loaded:
    """Both files of an adapter. Where the weights' header holds the config, nothing but the fields that are no property
    of the weights is taken from the JSON, with a warning if they disagree. two_steps: see `read_weights`."""
    model_id = os.fspath(model_id)
    with about_a_file(model_id):
        return _read(model_id, subfolder, strict, config, two_steps, remote)


def _read(
    model_id: str,
    subfolder: str | None,
    strict: bool,
    given: PeftConfig | None,
    two_steps: bool,
    remote: Mapping[str, object],
) -> Loaded:
    path, weights = _weights(model_id, subfolder, two_steps, remote)
    base = fingerprint_in(weights.header, path)
    stored = object_in(weights.header, "peft_config", path)
    if given is not None:
        config = given
        own = given.to_json_dict() if stored is not None and given.peft_type is not None else {}
        if stored is not None and (differ := _differences({k: stored[k] for k in own if k in stored}, own)):
            warn(f"The config that is given disagrees with the header of {path} in {differ}; the given one is used.")
    else:
        at = find_file(model_id, CONFIG_NAME, subfolder, remote)
        if at is None and stored is None:
            raise ValueError(f"Can't find '{CONFIG_NAME}' at '{model_id}'")
        values = PeftConfig.from_json_file(at) if at else {}
        if stored is not None:
            if at and (differ := _differences(stored, values)):
                warn(
                    f"{at} disagrees with the header of {path} in {differ}; the header's values are used, because they "
                    "were written together with the weights."
                )
            values = {**stored, **{k: values[k] for k in FREE if k in values}}
        require_method(values, str(at or path))
        config = PeftConfig.from_dict(values, source=str(at or path))
    tensors = weights.tensors
    for key, t in tensors.items():
        if sharded.hollow(t):
            raise CheckpointError(
                f"{path}: {key} has no elements; the file was written from one rank of a sharded model."
            )
    fetch = None
    if weights.fetch is None:
        _check_finite(weights, path)
    else:
        fetch = functools.partial(_fetched, weights.fetch, path)
    return Loaded(config, tensors, base, path, owned=not weights.whole, fetch=fetch)


def _weights(
    model_id: str, subfolder: str | None, two_steps: bool, remote: Mapping[str, object]
) -> tuple[str, Weights]:
    """The weights file and what it holds; looked for again where another process replaced it by one of the other form."""
    for _ in range(5):
        path = find_file(model_id, SAFETENSORS_WEIGHTS_NAME, subfolder, remote) or find_file(
            model_id, WEIGHTS_NAME, subfolder, remote
        )
        if path is None or not path.endswith(SAFETENSORS_WEIGHTS_NAME):
            there = os.path.join(model_id, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
            if os.path.lexists(there) and not os.path.isfile(there):  # a `.bin` beside it is an older adapter's
                raise CheckpointError(f"{there} is no file: it is a folder, or a link that leads nowhere.")
        if path is not None:
            with contextlib.suppress(FileNotFoundError):
                return path, read_weights(path, two_steps)
    raise ValueError(f"Can't find weights for {model_id}: expected {SAFETENSORS_WEIGHTS_NAME} or {WEIGHTS_NAME} there.")


def _differences(stored: dict[str, Any], values: dict[str, Any]) -> str:
    """The fields, other than the free ones, in which a config differs from the one that the header has; "" for none."""
    names = {k for k in (*stored, *values) if k not in FREE and k != "runtime_config"}
    found = sorted(k for k in names if k not in stored or k not in values or stored[k] != values[k])
    return few(found) if found else ""


def _check_finite(weights: Weights, path: str) -> None:
    if bad := not_finite(weights):
        raise CheckpointError(f"{path}: {bad[0]} holds NaN or inf.")


def _fetched(fetch: Fetch, path: str, keys: Iterable[str]) -> dict[str, Tensor]:
    """Values of a large file."""
    with about_a_file(path):
        found = fetch(keys)
    _check_finite(Weights(found, {}), path)
    return found


def warn(text: str) -> None:
    """A warning about a file, at the caller of this library's function."""
    warnings.warn(printable(text), stacklevel=6)
