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
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import CONFIG_NAME, PeftConfig, find_file
from ..registry import method as method_of
from . import sharded
from .errors import CheckpointError, near
from .light import uninterrupted
from .method import Method
from .mix import Adapter, Hub
from .weights import alone, apart, not_finite, read_weights, write_weights

WEIGHTS_NAME = "adapter_model.bin"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
ROOT = "base_model.model."


@dataclasses.dataclass
class Slot:
    """Where one tensor of the file lives in memory."""

    method: Method
    attr: str

    @property
    def tensor(self) -> Tensor:
        return _at(self.method, self.attr)

    @property
    def disk_shape(self) -> tuple[int, ...]:
        shape = self.method.disk_shape(self.attr)
        return tuple((self.tensor if shape is None else self.tensor.reshape(shape)).shape)

    def assign(self, value: Tensor, adopt: bool = False) -> None:
        """adopt: nobody holds the storage yet, and the value is ours to keep: no copy."""
        old = self.tensor
        if value.shape != old.shape:
            value = value.reshape(old.shape)
        device = self.method.home if old.is_meta else old.device
        if value.dtype != old.dtype or value.device != device:
            value = value.to(device, old.dtype)
        value = sharded.like(value, old)
        if adopt and type(old) is nn.Parameter and not old.is_meta:
            old.data = value
        elif isinstance(old, nn.Parameter):
            if old.device.type == "meta":
                owner, _, leaf = self.attr.rpartition(".")
                holder = attrgetter(owner)(self.method) if owner else self.method
                holder._parameters[leaf] = nn.Parameter(alone(value), requires_grad=old.requires_grad)
            else:
                old.data.copy_(value)  # in place: optimisers, compiled graphs and flat parameters hold the storage
        else:
            old.copy_(value)


def root_of(config: Any) -> str:
    """What stands before a module's path: methods whose site is the whole model have no tuner wrapper on disk."""
    return "base_model." if config.is_prompt_learning else ROOT


def slots(adapter: Adapter) -> Iterator[tuple[str, Slot]]:
    """(key in the file, place in memory) of every tensor of an adapter."""
    return ((key, Slot(method, attr)) for key, method, attr, _ in _tensors(adapter))


def _tensors(adapter: Adapter) -> Iterator[tuple[str, Method, str, Tensor]]:
    root = root_of(adapter.config)
    seen: set[str] = set()
    for stem, method in adapter.methods:
        for attr, key in method.disk_keys().items():
            if (held := _held(method, attr)) is not None:
                yield (f"{root}{stem}.{key}" if stem else key), method, attr, held
        for attr, key in method.shared_keys.items():
            if key not in seen and (held := _held(method, attr)) is not None:
                seen.add(key)
                yield f"base_model.{key}", method, attr, held


def _at(method: Method, attr: str) -> Tensor:
    """What a dotted name means below a method: nearly always a parameter of its own, or an attribute that says None."""
    own = method._parameters.get(attr)
    if own is not None:
        return own
    return method.__dict__[attr] if attr in method.__dict__ else attrgetter(attr)(method)  # type: ignore[no-any-return]


def _held(method: Method, attr: str) -> Tensor | None:
    try:
        return _at(method, attr)
    except AttributeError:
        return None


def state_dict(hub: Hub, name: str, gathered: sharded.Gathered | None = None) -> dict[str, Tensor]:
    """The adapter's tensors under their keys in the file. gathered: values of tensors that are not whole here."""
    hub.known([name])
    adapter = hub.adapters[name]
    out: dict[str, Tensor] = {}
    for key, method, attr, value in _tensors(adapter):
        if attr in method.unwritten:
            continue
        if gathered is not None and (found := gathered(method, attr)) is not None:
            value = found
        why = sharded.unreadable(value)
        if why:
            raise CheckpointError(
                f"Adapter {name!r}: {key} holds no values ({why}). Load weights first; with ZeRO-3 or FSDP save through "
                "the trainer, which gathers them, or pass state_dict=accelerator.get_state_dict(model)."
            )
        value = method.stored(attr, value.detach())
        shape = method.disk_shape(attr)
        out[key] = value if shape is None else value.reshape(shape)
    return _translate(hub, out, adapter, "to_disk")


def _translate(hub: Hub, state: dict[str, Tensor], adapter: Adapter, how: str) -> dict[str, Tensor]:
    """Let composites (experts) turn their parts' tensors into upstream's layout, or back."""
    for stem, composite in hub.composites.items():
        methods = {s.removeprefix(f"{stem}."): m for s, m in adapter.methods if s.startswith(f"{stem}.")}
        prefix = f"{root_of(adapter.config)}{stem}."
        mine = {k.removeprefix(prefix): state.pop(k) for k in list(state) if k.startswith(prefix)}
        state.update({prefix + k: v for k, v in getattr(composite, how)(mine, methods).items()})
    return state


# -- writing ----------------------------------------------------------------------------------------------------------------
def fingerprint(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """What the adapter was trained on: class, vocabulary, the shapes of the adapted weights."""
    shapes = {}
    for stem, m in adapter.methods:
        g = m.geometry
        if stem and not g.weightless:
            shapes[stem] = [g.out, g.fan_in]
    return {"class": type(model).__name__, "vocab_size": vocab_size(model), "shapes": shapes}


def vocab_size(model: nn.Module) -> int | None:
    get = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        return None
    return getattr(embedding, "num_embeddings", None)


@uninterrupted()
def save(
    model: nn.Module,
    hub: Hub,
    name: str,
    folder: str | os.PathLike[str],
    *,
    safe: bool = True,
    extra: dict[str, Tensor] | None = None,
    gathered: sharded.Gathered | None = None,
) -> None:
    """Write one adapter: two files, no network."""
    adapter = hub.adapters[name]
    config = dataclasses.replace(adapter.config)
    config.inference_mode = True
    fill_base(config, model)
    os.makedirs(folder, exist_ok=True)
    found = {**state_dict(hub, name, gathered), **(extra or {})}
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


def fill_base(config: Any, model: nn.Module) -> None:
    """base_model_name_or_path, and auto_mapping where no task type says the class."""
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model, "name_or_path", None) or getattr(
            getattr(model, "config", None), "_name_or_path", None
        )
    if config.task_type is None and config.auto_mapping is None:
        config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


# -- reading ----------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Loaded:
    """An adapter read from disk, not yet in a model."""

    config: Any
    tensors: dict[str, Tensor]
    base: dict[str, Any] | None = None
    source: str = ""
    owned: bool = False  # the tensors were read from a file for this adapter alone: nobody else holds them


def read(
    model_id: str,
    *,
    subfolder: str | None = None,
    strict: bool = True,
    config: Any = None,
    device: str | None = None,
    **hub: Any,
) -> Loaded:
    """Both files of an adapter. The weights' header wins over the JSON where they disagree, with a warning."""
    model_id = os.fspath(model_id)
    path = find_file(model_id, SAFETENSORS_WEIGHTS_NAME, subfolder, hub) or find_file(
        model_id, WEIGHTS_NAME, subfolder, hub
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
        at = find_file(model_id, CONFIG_NAME, subfolder, hub)
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


def targets(tensors: Iterable[str], config: Any) -> set[str] | None:
    """The paths of the modules that a file's tensors belong to; None where it holds raw parameters' adapters, too."""
    if getattr(config, "target_parameters", None):
        return None
    bodies = (k.removeprefix(ROOT) for k in tensors)
    mark = f".{method_of(config.peft_type).prefix}"
    return {b.rpartition(mark)[0] for b in bodies if mark in b}


def fit(
    hub: Hub, adapter: Adapter, tensors: dict[str, Tensor]
) -> tuple[dict[str, tuple[Slot, Tensor]], list[str], list[str]]:
    """Match a file's tensors to an adapter's slots: (pairs, keys missing in the file, keys nobody takes)."""
    root = root_of(adapter.config)
    tensors = {_with_root(k, root): v for k, v in tensors.items()}
    tensors = _translate(hub, tensors, adapter, "from_disk")
    for stem, method in adapter.methods:
        prefix = f"{root}{stem}." if stem else ""
        if type(method).resize is Method.resize:
            continue
        keys = {a: prefix + k for a, k in method.disk_keys().items()}
        keys |= {a: f"base_model.{k}" for a, k in method.shared_keys.items()}
        method.resize({a: tensors[k] for a, k in keys.items() if k in tensors})
    wanted = dict(slots(adapter))
    pairs = {k: (s, tensors[k]) for k, s in wanted.items() if k in tensors}
    optional = {k for k, s in wanted.items() if s.attr in (*s.method.optional, *s.method.unwritten)}
    missing = [k for k in wanted if k not in tensors and k not in optional]
    again = tuple(f"{root}{stem}.{start}" for stem, method in adapter.methods for start in method.repeats)
    return pairs, missing, [k for k in tensors if k not in wanted and not k.startswith(again)]


def _with_root(key: str, root: str) -> str:
    """Files of injected models and of diffusers lack the prefix of the PeftModel wrapper."""
    if key.startswith("base_model.") or "." not in key:
        return key
    return root + key


def check_fit(
    adapter: Adapter, pairs: dict[str, tuple[Slot, Tensor]], missing: list[str], extra: list[str], source: str
) -> None:
    """Raise unless every key lands and every tensor is filled with its shape."""
    if missing or extra:
        file_keys = [*pairs, *extra]
        hint = "".join(near(m, extra, 1) for m in missing[:1]) or "".join(near(e, missing, 1) for e in extra[:1])
        raise CheckpointError(
            f"{source or 'The state dict'} does not fit this model.{hint}"
            f"\n  {len(missing)} tensors of the adapter are not in the file: {_few(missing)}"
            f"\n  {len(extra)} keys of the file have no place in the model: {_few(extra)}"
            f"\n  {len(pairs)} of {len(file_keys)} keys fit. Check the base model and the adapter's target_modules."
        )
    wrong = [
        f"{k}: file {tuple(t.shape)}, model {s.disk_shape}"
        for k, (s, t) in pairs.items()
        if t.shape != s.tensor.shape and tuple(t.shape) != s.disk_shape
    ]
    if wrong:
        raise CheckpointError(
            f"{source or 'The state dict'}: size mismatch, is this the right base model? {_few(wrong)}"
        )


def _few(items: list[str], n: int = 6) -> str:
    return ", ".join(items[:n]) + (f", … ({len(items)} in all)" if len(items) > n else "") if items else "none"


def check_base(model: nn.Module, loaded: Loaded, adapter: Adapter) -> None:
    """The saved fingerprint against this model."""
    if not loaded.base:
        return
    here = fingerprint(model, adapter)
    for what, say in (("class", "a"), ("vocab_size", "vocabulary size")):
        if loaded.base.get(what) is not None and here[what] is not None and loaded.base[what] != here[what]:
            raise CheckpointError(
                f"{loaded.source}: the adapter was trained on {say} {loaded.base[what]}, this model has {say} {here[what]}. "
                "Load it on the right base, or pass strict=False to try all the same."
            )
    for stem, shape in loaded.base.get("shapes", {}).items():
        if stem in here["shapes"] and here["shapes"][stem] != shape:
            raise CheckpointError(
                f"{loaded.source}: {stem} had weight shape {shape} when the adapter was trained, here it is {here['shapes'][stem]}."
            )


def assign(pairs: dict[str, tuple[Slot, Tensor]], adapter: Adapter, adopt: bool = False) -> None:
    taken: set[int] = set()
    copies: tuple[list[Tensor], list[Tensor]] = [], []
    with torch.no_grad():
        for slot, tensor in pairs.values():
            if not adopt and type(old := slot.tensor) is nn.Parameter and _alike(old, tensor):
                copies[0].append(old.data)
                copies[1].append(tensor)
                continue
            at = tensor.data_ptr()
            slot.assign(tensor, adopt and tensor.is_contiguous() and at not in taken)
            taken.add(at)
        if copies[0]:
            torch._foreach_copy_(*copies)
    for _, method in adapter.methods:
        method.loaded()


def _alike(old: Tensor, value: Tensor) -> bool:
    return old.shape == value.shape and old.device == value.device and not old.is_meta and type(value) is Tensor


def push_folder(write: Callable[[str], Any], repo_id: str, **kwargs: Any) -> Any:
    """Write into a temporary folder and upload it."""
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.pop("token", None))
    api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True)
    message = kwargs.pop("commit_message", None) or "Upload adapter"
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        return api.upload_folder(repo_id=repo_id, folder_path=Path(folder), commit_message=message)
