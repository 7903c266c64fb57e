"""Bringing a saved adapter into a model: read, plan, check every key, then commit. Heads and whole embeddings included."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from ...config import PeftConfig, TunerConfig
from ...contract.capabilities import NeedsTokens
from ...contract.cheap_modules import made_on_the_cpu, uninterrupted
from ...errors import CheckpointError, about_a_file
from ...registry import companions, method
from ...remote import CODE_KWARGS, HUB_KWARGS, PLACING_KWARGS, refuse_others
from ..acting.on_model import roster_of
from ..acting.roster import Adapter, Roster
from ..anatomy.embeddings import vocab_size
from ..anatomy.heads import prepare_head
from ..files.adapter_files import read, warn
from ..files.header import Fingerprint, Loaded, check_base
from ..files.keys import ROOT, FileTensor, assign, check_keys, check_values, few, fit, modules_in_file
from ..files.older_keys import translate
from ..injection.commit import commit
from ..injection.plan import Plan, plan
from .embeddings import split_off
from .room_for_tokens import growth, room_for_tokens

MOST_ROWS = 2**16  # by which loading makes a base's embeddings grow, if they are not larger themselves

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
    two_steps: bool = True,
) -> Loaded:
    """Both files of an adapter, the keys renamed by the first pattern of `key_mapping` that a key holds."""
    refuse_others("Loading an adapter", kwargs, (*HUB_KWARGS, *CODE_KWARGS, *PLACING_KWARGS, *NAMED))
    if "torch_dtype" in kwargs or "dtype" in kwargs:
        warnings.warn(
            "A dtype says nothing to an adapter that is loaded: autocast_adapter_dtype decides between fp32 and the base's.",
            stacklevel=3,
        )
    remote = {k: v for k, v in kwargs.items() if k in HUB_KWARGS}
    loaded = read(
        os.fspath(model_id),
        subfolder=kwargs.get("subfolder"),
        strict=strict,
        config=config,
        two_steps=two_steps,
        **remote,
    )
    if key_mapping:
        rename(loaded, key_mapping)
    return loaded


def rename(loaded: Loaded, key_mapping: Mapping[str, str]) -> None:
    """Rename what a file says of modules, as where its base is a part of another model here.

    A file of which keys change goes just where they lead, whatever else its target names would match in this model; its
    base's class says nothing then, but the sizes of its weights do.
    """

    def renamed(key: str) -> str:
        body = key.removeprefix(ROOT)
        for pattern, replacement in key_mapping.items():
            body, n = re.subn(pattern, replacement, body)
            if n:
                break
        return body

    loaded.read_values()  # whose keys are the file's
    before = loaded.tensors
    loaded.tensors = {ROOT + renamed(k): v for k, v in before.items()}
    if loaded.tensors.keys() == before.keys():
        return
    config = loaded.config = copy.deepcopy(loaded.config)
    old = modules_in_file(before, config) or set()
    if old and getattr(config, "target_modules", None):
        assert isinstance(config, TunerConfig)
        config.target_modules = sorted(map(renamed, old))
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        for name in ("rank_pattern", "alpha_pattern"):
            if patterns := getattr(config, name, None):
                setattr(config, name, {renamed(k) if k in old else k: v for k, v in patterns.items()})
    if loaded.base:
        shapes = loaded.base.get("shapes", {})
        kept = {k: v for k, v in loaded.base.items() if k != "class"}
        loaded.base = cast(Fingerprint, {**kept, "shapes": {renamed(k): v for k, v in shapes.items()}})


def loading(autocast_adapter_dtype: bool, kwargs: Mapping[str, object]) -> dict[str, bool]:
    """Arguments of `load_into`, of which upstream's functions take some without naming them."""
    ignore = bool(kwargs.get("ignore_mismatched_sizes", False))
    return {"autocast_adapter_dtype": autocast_adapter_dtype, "ignore_mismatched_sizes": ignore}


def load_into(
    model: nn.Module,
    loaded: Loaded,
    name: str,
    *,
    strict: bool = True,
    autocast_adapter_dtype: bool = True,
    ignore_mismatched_sizes: bool = False,
) -> LoadResult:
    """Plan, check every key, then commit: a file that does not fit leaves the model as it was.

    strict: every key lands, and every tensor is filled; else what is missing starts fresh, as what has another size does
    with ignore_mismatched_sizes.
    """
    with uninterrupted(), about_a_file(loaded.source or "The adapter"):
        check_before_growing(model, loaded)
        with room_for_tokens(model, loaded):
            return _load_into(model, loaded, name, strict, autocast_adapter_dtype, ignore_mismatched_sizes)


def _load_into(
    model: nn.Module, loaded: Loaded, name: str, strict: bool, autocast_adapter_dtype: bool, ignore_sizes: bool
) -> LoadResult:
    prepare_head(model, loaded.config, loading=True)
    if beyond_the_file(loaded):  # what the config asks for is held against the file before there is memory for it
        check_values(fitted(model, copied(loaded), name, ignore_sizes, meta=True).pairs, loaded.source, ignore_sizes)
    wrong: list[str] = []

    def check(fit: Fit) -> None:
        if strict:
            check_base(model, loaded, fit.adapter, ignore_sizes)
            check_keys(fit.pairs, fit.missing, fit.extra, loaded.source)
        wrong[:] = check_values(fit.pairs, loaded.source, ignore_sizes)

    options = {"autocast_adapter_dtype": autocast_adapter_dtype}
    fit = checked(model, loaded, name, check, ignore_sizes, init=False, **options)
    if fit.missing or wrong:
        # what a file lacks starts as a fresh adapter would: memory that nobody wrote is never used. Nothing is drawn for a
        # file that has all: a prompt may start from a tokenizer, which the config names
        fit = checked(model, loaded, name, check, ignore_sizes, init=True, **options)
    if not strict and (fit.missing or fit.extra):
        warn(
            f"{loaded.source}: {len(fit.missing)} tensors missing, {len(fit.extra)} keys not used. Missing, so they start "
            f"fresh: {few(fit.missing)}. Not used: {few(fit.extra)}."
        )
    if wrong:
        warn(f"{loaded.source}: {len(wrong)} tensors have another size here, so they start fresh: {few(wrong)}.")
    assign({k: v for k, v in fit.pairs.items() if k not in wrong}, fit.adapter, adopt=loaded.owned)
    commit(model, fit.planned)
    return LoadResult(fit.missing, fit.extra, wrong)


@dataclasses.dataclass
class Fit:
    """A plan, and how a file's tensors fit it."""

    planned: Plan
    adapter: Adapter
    scratch: Roster
    pairs: dict[str, tuple[FileTensor, Tensor]] = dataclasses.field(default_factory=dict)
    missing: list[str] = dataclasses.field(default_factory=list)
    extra: list[str] = dataclasses.field(default_factory=list)

    def fit(self, model: nn.Module, loaded: Loaded, ignore_sizes: bool) -> list[str]:
        """Fit a file's tensors; the paths of embeddings that are a part of the adapter and not planned yet."""
        found = fit_any_layout(model, self.scratch, self.adapter, loaded.tensors)
        self.pairs, self.missing, extra, loaded.tensors = found
        self.extra, embeddings = split_off(model, self.adapter, loaded, extra, ignore_sizes)
        return embeddings


def checked(
    model: nn.Module,
    loaded: Loaded,
    name: str,
    check: Callable[[Fit], object],
    ignore_sizes: bool = False,
    **plans: Any,
) -> Fit:
    """`fitted`, and checked; of a large file its sizes first, and when they are right its values."""
    known = dataclasses.replace(loaded, tensors=dict(loaded.tensors))
    fit = fitted(model, known, name, ignore_sizes, **plans)
    check(fit)
    if loaded.fetch is not None:
        loaded.read_values()
        if fit.fit(model, loaded, ignore_sizes):
            fit.fit(model, loaded, ignore_sizes)  # embeddings are under the keys of their part now
        check(fit)
    return fit


def fitted(model: nn.Module, loaded: Loaded, name: str, ignore_sizes: bool = False, **plans: Any) -> Fit:
    """Plan an adapter for a file and fit the file's tensors to it: whole embeddings, too, which the keys alone declare.

    plans: arguments of `plan`.
    """
    there = roster_of(model)
    for _ in range(2):
        planned = plan(model, loaded.config, name, **plans)
        fit = Fit(planned, planned.adapter(), Roster())
        fit.scratch.composites = {**(there.composites if there is not None else {}), **planned.composites()}
        embeddings = fit.fit(model, loaded, ignore_sizes)
        if not embeddings:
            break
        loaded.config.saved_embeddings = embeddings
    return fit


def check_before_growing(model: nn.Module, loaded: Loaded) -> None:
    """Where the base would grow for the adapter's tokens: all that does not depend on them must fit before it does."""
    rows = growth(model, loaded)
    if rows is None:
        return
    if rows > max(MOST_ROWS, vocab_size(model) or 0):
        raise CheckpointError(
            f"{loaded.source}: its vocab_size and token indices ask for {rows} more rows of the base's embeddings: call "
            "resize_token_embeddings yourself if that is meant."
        )
    trial = copied(loaded)
    for field, cls in companions().items():
        if issubclass(cls, NeedsTokens) and getattr(trial.config, field, None):
            setattr(trial.config, field, None)
    if issubclass(method(trial.config.peft_type), NeedsTokens):
        return
    prepare_head(model, trial.config, loading=True)
    fit = fitted(model, trial, "%trial", True, meta=True, init=False)
    check_keys(fit.pairs, fit.missing, [], loaded.source)
    grown = (vocab_size(model) or 0) + rows  # what has a row for each token fits only then
    check_values({k: p for k, p in fit.pairs.items() if grown not in p[1].shape}, loaded.source)


def copied(loaded: Loaded) -> Loaded:
    """For a trial: a plan may fill fields of the config."""
    return dataclasses.replace(loaded, config=copy.deepcopy(loaded.config), tensors=dict(loaded.tensors))


def beyond_the_file(loaded: Loaded) -> bool:
    """Whether the config holds a number that no tensor of the file has as a size, and that is large for a rank."""
    largest = max((n for t in loaded.tensors.values() for n in t.shape), default=0)
    values = [v for k, v in vars(loaded.config).items() if k != "seed"]
    values += [w for v in values if isinstance(v, dict) for w in v.values()]
    return any(isinstance(v, int) and v > max(largest, 2**14) for v in values)


def fit_any_layout(
    model: nn.Module, roster: Roster, adapter: Adapter, tensors: dict[str, Tensor]
) -> tuple[dict[str, tuple[FileTensor, Tensor]], list[str], list[str], dict[str, Tensor]]:
    """`fit`, also for files made on an older layout of the model; and the tensors by the present one."""
    pairs, missing, extra = fit(roster, adapter, tensors)
    if extra:
        tensors = translate(model, adapter, tensors)
        pairs, missing, extra = fit(roster, adapter, tensors)
    return pairs, missing, extra, tensors
