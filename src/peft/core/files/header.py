"""What the header of a weights file says of the base that the adapter was trained on."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypedDict

from torch import Tensor, nn

from ...config import PeftConfig
from ...contract.managed import class_of
from ...errors import LONGEST_NAME, CheckpointError
from ...local_files import json_object
from ..acting.roster import Adapter
from ..anatomy.embeddings import vocab_size
from .sharded import bare

Fingerprint = TypedDict(
    "Fingerprint", {"class": str, "vocab_size": int | None, "shapes": dict[str, list[int]]}, total=False
)
SAID: tuple[tuple[Literal["class", "vocab_size"], str], ...] = (("class", "a"), ("vocab_size", "vocabulary size"))

OUTER = ("OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "CheckpointWrapper")
PUT_IN_FRONT = ("FSDP", "DDP", "Replicate", "Parametrized")  # of a class's name, by what makes a class of its own of it

FREE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")  # of a config: fields
# that are no property of the weights, so that the JSON may change them


# -- writing ----------------------------------------------------------------------------------------------------------------
def fingerprint(model: nn.Module, adapter: Adapter) -> Fingerprint:
    """What the adapter was trained on: class, vocabulary, the shapes of the adapted weights."""
    shapes = {}
    for disk_path, m in adapter.methods:
        g = m.geometry
        if disk_path and not g.weightless:
            shapes[disk_path] = [g.out, g.fan_in]
    model = bare(model)
    return {"class": class_of(model).__name__, "vocab_size": vocab_size(model), "shapes": shapes}


def same_class(saved: str, model: nn.Module) -> bool:
    """Whether a file's word for a class means the model's: also with the marks that sharding makes of it in older files,
    in other capitals, or by an older name that transformers keeps."""
    here = class_of(bare(model))
    if saved in OUTER or saved.casefold() == here.__name__.casefold():
        return True
    if saved.removeprefix(next((p for p in PUT_IN_FRONT if saved.startswith(p)), "")) == here.__name__:
        return True
    return getattr(sys.modules.get("transformers"), saved, None) is here


def fill_base(config: PeftConfig, model: nn.Module) -> None:
    """base_model_name_or_path, and auto_mapping where no task type says the class."""
    model = bare(model)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model, "name_or_path", None) or getattr(
            getattr(model, "config", None), "_name_or_path", None
        )
    if config.task_type is None and config.auto_mapping is None:
        cls = class_of(model)
        config.auto_mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}


# -- reading ----------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Loaded:
    """An adapter read from disk, not yet in a model."""

    config: PeftConfig
    tensors: dict[str, Tensor]
    base: Fingerprint | None = None
    source: str = ""
    owned: bool = False  # the tensors were read from a file for this adapter alone: nobody else holds them
    fetch: Callable[[Iterable[str]], dict[str, Tensor]] | None = None  # of a large file, whose tensors are on the meta
    # device until all that it says has been checked: what reads the values of these keys

    def read_values(self) -> None:
        """Of a large file, read what has been checked."""
        if self.fetch is not None:
            self.tensors, self.fetch, self.owned = self.fetch(list(self.tensors)), None, True


def object_in(header: Mapping[str, str], name: str, source: str) -> dict[str, Any] | None:
    """What a file's header holds under a name, as an object; None where it holds nothing there."""
    if name not in header:
        return None
    try:
        return json_object(header[name])
    except ValueError as e:
        raise CheckpointError(f"{source}: {name} in its header is no valid JSON ({e}); the file is damaged.") from e


def fingerprint_in(header: Mapping[str, str], source: str) -> Fingerprint | None:
    """The fingerprint of the base that a file's header holds."""
    found = object_in(header, "peft_base", source)
    if found is None:
        return None
    shapes = found.get("shapes", {})
    right = {
        "class": isinstance(found.get("class", ""), (str, type(None))),
        "vocab_size": type(found.get("vocab_size")) in (int, type(None)),
        "shapes": isinstance(shapes, dict) and all(isinstance(s, list) for s in shapes.values()),
    }
    wrong = [name for name, fits in right.items() if not fits]
    if wrong:
        raise CheckpointError(f"{source}: {wrong[0]} of peft_base in its header is {str(found[wrong[0]])[:200]!r}.")
    return {k: found[k] for k in right if k in found}  # type: ignore[return-value]


def check_base(model: nn.Module, loaded: Loaded, adapter: Adapter, ignore_sizes: bool = False) -> None:
    """The saved fingerprint against this model. ignore_sizes: nothing but its class."""
    if not loaded.base:
        return
    here = fingerprint(model, adapter)
    for what, say in SAID[: 1 if ignore_sizes else None]:
        if loaded.base.get(what) is not None and here[what] is not None and loaded.base[what] != here[what]:
            if what == "class" and same_class(loaded.base["class"], model):
                continue
            raise CheckpointError(
                f"{loaded.source}: the adapter was trained on {say} {str(loaded.base[what])[:LONGEST_NAME]}, this model has {say} {here[what]}. "
                "Load it on the right base, or pass strict=False to try all the same."
            )
    for disk_path, shape in loaded.base.get("shapes", {}).items() if not ignore_sizes else ():
        if disk_path in here["shapes"] and here["shapes"][disk_path] != shape:
            raise CheckpointError(
                f"{loaded.source}: {disk_path} had weight shape {str(shape)[:LONGEST_NAME]} when the adapter was trained, here it is {here['shapes'][disk_path]}."
            )
