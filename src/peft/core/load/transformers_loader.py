"""An adapter's file through transformers' own loader (`model.load_adapter`), with the meaning that `from_pretrained` has.

That loader renames each key of a file by a list of transforms until it names a tensor of the model, and assigns one
tensor at a time. Keys of shared banks, of stacked experts or of an older layout name no single tensor, so here all keys
run together: one renaming leads every key to a tensor of the adapter, and `AdapterFile`, the transform that is asked
for the values last, gets all tensors with their own keys and fills the adapter as this library does.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from ...config import PeftConfig
from ...errors import CheckpointError
from ..acting.on_model import roster_of
from ..acting.roster import Roster
from ..files.header import Loaded
from ..files.keys import ROOT, check_fit, check_values
from ..injection.remove import delete
from ..injection.shared import refill
from .embeddings import split_off
from .hotswap import swap
from .load import fit_any_layout

if TYPE_CHECKING:
    from transformers.core_model_loading import LoadStateDictInfo


Pending: TypeAlias = "Future[torch.Tensor] | Callable[[], torch.Tensor]"  # a tensor that the loader still reads


class Loading:
    """The adapter that transformers is about to load: its name, and its config for as long as the loader holds that.

    A load that fails leaves nothing behind: its config is gone, or stands in the model for which it was."""

    name = ""
    config: Callable[[], PeftConfig | None] = staticmethod(lambda: None)
    adopted = False  # a model has taken the config in: the load is into that model

    def begin(self, name: str, config: PeftConfig | None) -> None:
        self.name, self.adopted = name, False
        self.config = (lambda: None) if config is None else weakref.ref(config)

    def end(self) -> None:
        self.name = ""

    def into(self, roster: Roster, held: Iterable[str]) -> bool:
        """Whether it goes into a layer that holds adapters of these names. A swap brings a config that no model has."""
        config = self.config()
        if not self.name or config is None or self.name not in held:
            return False
        mine = roster.configs.get(self.name) is config
        self.adopted = self.adopted or mine
        return mine or not self.adopted


loading = Loading()


def build_peft_weight_mapping(
    weight_conversions: Sequence[object] | None, adapter_name: str, peft_config: PeftConfig | None = None
) -> list[object]:
    """The transforms that transformers applies to an adapter file; it adds `load_map` of what holds the adapter.

    The base model's own conversions are not among them: where a file was made on an older layout, `core/files/older_keys.py`
    translates it, here and everywhere else.
    """
    loading.begin(adapter_name, peft_config)
    return [_adapter_file()(adapter_name, peft_config)]


@functools.cache
def _adapter_file() -> type:
    from transformers.core_model_loading import WeightConverter, _IdentityOp

    class AdapterFile(WeightConverter):
        """Takes every tensor of a file, and fills the adapter when the loader asks for the first value."""

        __slots__ = ("adapter_name", "config", "futures")

        def __init__(self, adapter_name: str, config: PeftConfig | None) -> None:
            super().__init__("(?s:.)", "\\g", [_IdentityOp()])
            self.adapter_name, self.config = adapter_name, config
            self.futures: dict[str, Pending] = {}

        def __deepcopy__(self, memo: dict[int, object]) -> AdapterFile:
            return self  # the loader wants a copy for each tensor; all are one here

        def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
            return source_key, self.source_patterns[0]

        def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Pending) -> None:
            self.futures[source_key] = future

        def was_used(self) -> bool:
            return False  # no part of how the base model is saved

        def convert(
            self,
            layer_name: str,
            model: nn.Module | None = None,
            config: object = None,
            hf_quantizer: object = None,
            loading_info: LoadStateDictInfo | None = None,
        ) -> dict[str, torch.Tensor]:
            if self.futures:
                loading.end()
                futures, self.futures = self.futures, {}
                values = {k: f() if callable(f) else f.result() for k, f in futures.items()}
                assert model is not None and loading_info is not None
                fill(model, self.adapter_name, self.config, values, loading_info)
            return {}

    return AdapterFile


def fill(
    model: nn.Module, name: str, config: PeftConfig | None, tensors: dict[str, torch.Tensor], report: LoadStateDictInfo
) -> None:
    """Bring a file's tensors into the adapter `name`, and say in transformers' report what did not fit.

    An adapter with another config than the file's is one to be swapped for it. A file that fills nothing is an error.
    """
    roster = roster_of(model)
    assert roster is not None
    if config is not None and roster.configs.get(name) is not config:
        swap(model, Loaded(config, tensors, source="The adapter file"), name)
        report.missing_keys.clear()
        return
    adapter = roster.adapters[name]
    loaded = Loaded(adapter.config, dict(tensors), source="The adapter file")
    pairs, missing, extra, loaded.tensors = fit_any_layout(model, roster, adapter, loaded.tensors)
    extra, embeddings = split_off(model, adapter, loaded, extra)
    if not pairs:
        delete(model, name)
        check_fit(pairs, missing, extra, "The adapter file")
        raise CheckpointError("The adapter file holds no tensors of an adapter.")
    if embeddings:  # a part that the adapter gets by planning it anew
        config = copy.deepcopy(adapter.config)
        config.saved_embeddings = embeddings
        swap(model, Loaded(config, loaded.tensors, source="The adapter file"), name)
        report.missing_keys.clear()
        return
    wrong = set(check_values(pairs, "The adapter file", ignore_sizes=True))
    report.missing_keys.clear()
    report.missing_keys.update(_shown(k, name) for k in missing)
    report.unexpected_keys.update(extra)
    mismatched: set[Any] = report.mismatched_keys  # stated there as pairs of one number each
    mismatched.update((_shown(k, name), pairs[k][1].shape, pairs[k][0].disk_shape) for k in wrong)
    refill(roster, adapter, {k: v for k, v in pairs.items() if k not in wrong})


def _shown(key: str, name: str) -> str:
    """A key as transformers reports it: it lists those that hold the adapter's name."""
    return f"{key.removeprefix(ROOT)} ({name})"
