"""Saving and loading: `adapter_config.json` and `adapter_model.safetensors` in upstream's layout.

Keys are written structurally, from the places the methods hang at, so an adapter's name never matters. The header of
the weights file carries the config and the base model's fingerprint; files are written aside and renamed, weights
first, so that a reader sees the old adapter or the new one. Loading checks everything before it changes anything.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import warnings

import torch
from torch import Tensor, nn

from ...config import CONFIG_NAME, PeftConfig, require_method
from ...contract.cheap_modules import uninterrupted
from ...errors import CheckpointError
from ...remote import find_file
from ..acting.roster import Roster
from . import sharded
from .header import Loaded, fill_base, fingerprint
from .keys import state_dict_of
from .tensors import alone, apart, not_finite, read_weights, write_weights

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
) -> None:
    """Write one adapter: two files, no network."""
    adapter = roster.adapters[name]
    config = dataclasses.replace(adapter.config)
    config.inference_mode = True
    fill_base(config, model)
    os.makedirs(folder, exist_ok=True)
    found = {**state_dict_of(roster, name, gathered), **(extra or {})}
    parts = [k for k, t in found.items() if sharded.split(t)]
    if parts:
        raise CheckpointError(
            f"Adapter {name!r}: {parts[0]} is split over processes; pass state_dict=accelerator.get_state_dict(model), "
            "which gathers it."
        )
    header = {
        "format": "pt",
        "peft_config": json.dumps(config.to_json_dict(), sort_keys=True),
        "peft_base": json.dumps(fingerprint(model, adapter), sort_keys=True),
    }
    target = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME if safe else WEIGHTS_NAME)
    fd, aside = tempfile.mkstemp(dir=folder, prefix=".adapter_", suffix=".tmp")
    os.close(fd)
    try:
        if safe:
            write_weights(found, aside, header)
        else:
            torch.save({k: alone(t) for k, t in apart(found).items()}, aside)
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, target)
    except BaseException:
        os.unlink(aside)
        raise
    stale = os.path.join(folder, WEIGHTS_NAME if safe else SAFETENSORS_WEIGHTS_NAME)
    if os.path.exists(stale):
        os.unlink(stale)
    config.save_pretrained(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read(
    model_id: str,
    *,
    subfolder: str | None = None,
    strict: bool = True,
    config: PeftConfig | None = None,
    device: str | None = None,
    **remote: object,
) -> Loaded:
    """Both files of an adapter. The weights' header wins over the JSON where they disagree, with a warning."""
    model_id = os.fspath(model_id)
    path = find_file(model_id, SAFETENSORS_WEIGHTS_NAME, subfolder, remote) or find_file(
        model_id, WEIGHTS_NAME, subfolder, remote
    )
    if path is None:
        raise ValueError(
            f"Can't find weights for {model_id}: expected {SAFETENSORS_WEIGHTS_NAME} or {WEIGHTS_NAME} there."
        )
    weights = read_weights(path, device)
    tensors, header = weights.tensors, weights.header
    base = json.loads(header["peft_base"]) if "peft_base" in header else None
    if config is None:
        stored = json.loads(header["peft_config"]) if "peft_config" in header else None
        at = find_file(model_id, CONFIG_NAME, subfolder, remote)
        if at is None and stored is None:
            raise ValueError(f"Can't find '{CONFIG_NAME}' at '{model_id}'")
        values = PeftConfig.from_json_file(at) if at else {}
        if stored is not None:
            free = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
            differ = sorted(k for k in stored if k not in free and values.get(k, stored[k]) != stored[k])
            if differ and at:
                warnings.warn(
                    f"{at} disagrees with the header of {path} in {', '.join(differ)}; the header's values are used, "
                    "because they were written together with the weights.",
                    stacklevel=3,
                )
            values = {**values, **{k: v for k, v in stored.items() if k not in free or k not in values}}
        require_method(values, str(at or path))
        config = PeftConfig.from_dict(values, source=str(at or path))
    for key, t in tensors.items():
        if sharded.hollow(t):
            raise CheckpointError(
                f"{path}: {key} has no elements; the file was written from one rank of a sharded model."
            )
    bad = not_finite(weights)
    if bad:
        raise CheckpointError(f"{path}: {bad[0]} holds NaN or inf.")
    return Loaded(config, tensors, base, path, owned=not weights.whole)
