"""What the header of a weights file says of the base that the adapter was trained on."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypedDict

from torch import Tensor, nn

from ...config import PeftConfig
from ...errors import CheckpointError
from ..acting.roster import Adapter
from ..anatomy.embeddings import vocab_size

Fingerprint = TypedDict(
    "Fingerprint", {"class": str, "vocab_size": int | None, "shapes": dict[str, list[int]]}, total=False
)
SAID: tuple[tuple[Literal["class", "vocab_size"], str], ...] = (("class", "a"), ("vocab_size", "vocabulary size"))


# -- writing ----------------------------------------------------------------------------------------------------------------
def fingerprint(model: nn.Module, adapter: Adapter) -> Fingerprint:
    """What the adapter was trained on: class, vocabulary, the shapes of the adapted weights."""
    shapes = {}
    for disk_path, m in adapter.methods:
        g = m.geometry
        if disk_path and not g.weightless:
            shapes[disk_path] = [g.out, g.fan_in]
    return {"class": type(model).__name__, "vocab_size": vocab_size(model), "shapes": shapes}


def fill_base(config: PeftConfig, model: nn.Module) -> None:
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

    config: PeftConfig
    tensors: dict[str, Tensor]
    base: Fingerprint | None = None
    source: str = ""
    owned: bool = False  # the tensors were read from a file for this adapter alone: nobody else holds them


def check_base(model: nn.Module, loaded: Loaded, adapter: Adapter) -> None:
    """The saved fingerprint against this model."""
    if not loaded.base:
        return
    here = fingerprint(model, adapter)
    for what, say in SAID:
        if loaded.base.get(what) is not None and here[what] is not None and loaded.base[what] != here[what]:
            raise CheckpointError(
                f"{loaded.source}: the adapter was trained on {say} {loaded.base[what]}, this model has {say} {here[what]}. "
                "Load it on the right base, or pass strict=False to try all the same."
            )
    for disk_path, shape in loaded.base.get("shapes", {}).items():
        if disk_path in here["shapes"] and here["shapes"][disk_path] != shape:
            raise CheckpointError(
                f"{loaded.source}: {disk_path} had weight shape {shape} when the adapter was trained, here it is {here['shapes'][disk_path]}."
            )
