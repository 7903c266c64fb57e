"""The functions that people call."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ...config import PeftConfig, TunerConfig
from ...errors import CheckpointError, NoMatchingPeftModuleError
from ..acting.on_model import roster_of
from ..acting.roster import Adapter
from ..anatomy.heads import prepare_head
from ..anatomy.targets import find
from ..anatomy.walk import walk
from ..files import sharded
from ..files.header import Loaded
from ..files.keys import ROOT, check_values, few, modules_in_file, root_of, state_dict_of
from ..files.sharded import unwrapped
from ..files.tensors import alone
from ..injection.commit import inject
from ..injection.plan import Plan
from ..injection.shared import refill
from ..load.embeddings import embedding_tensors
from ..load.load import Fit, LoadResult, read_adapter
from .peft_model import PeftModel, class_for
from .task_models import PeftMixedModel
from .wrapping import wrap


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put an adapter into a model and freeze the rest. A model that holds adapters gets one more, with a warning; it acts
    and trains instead of them, and one of the same name is replaced by it.

    Raises NoMatchingPeftModuleError for targets that match nothing, Refusal for combinations that mathematics or the
    base's format rules out, ValueError for names already taken; the model is then as it was.
    """
    if isinstance(model, PeftModel):
        base = model.get_base_model()
        prepare_head(base, peft_config)
        if peft_config.base_model_name_or_path is None:
            peft_config.base_model_name_or_path = getattr(base, "name_or_path", None)
        how = {"init": True, "meta": low_cpu_mem_usage, "autocast_adapter_dtype": autocast_adapter_dtype}
        wrap(base, peft_config, adapter_name, **how)
        return model
    named = getattr(sharded.bare(model), "name_or_path", None)
    peft_config.base_model_name_or_path = named or peft_config.base_model_name_or_path
    if revision is not None:
        peft_config.revision = revision
    cls: type[PeftModel] = PeftMixedModel if mixed else class_for(peft_config)
    return cls(
        model,
        peft_config,
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter into a model in place, without wrapping it. It is then the one that acts, and that trains.

    state_dict: weights that will be loaded next; the adapter goes just where they belong, whatever else the config's
    target names would match. An adapter that is loaded takes the base's dtype and tolerates target names that match
    nothing, with a warning: what loads the weights tells which of them found no place. One to be trained is in fp32.
    """
    loading = state_dict is not None or peft_config.inference_mode
    roster = inject(
        model,
        peft_config,
        adapter_name,
        meta=low_cpu_mem_usage,
        autocast_adapter_dtype=not loading,
        strict=not loading,
        only=None if state_dict is None else modules_in_file(state_dict, peft_config),
    )
    roster.activate([adapter_name])
    roster.train_only([adapter_name], peft_config.inference_mode)
    if state_dict is not None:
        _tell_of_targets(model, peft_config, roster.adapters[adapter_name].targeted)
    if not isinstance(model, PeftModel):
        model.__dict__.setdefault("peft_config", roster.configs)
    return model


def _tell_of_targets(model: nn.Module, config: PeftConfig, reached: Sequence[str]) -> None:
    """Warn where a state dict reaches other modules than the config's target names mean."""
    if not isinstance(config, TunerConfig) or getattr(config, "target_parameters", None):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            meant = {p.path for p in find(model, config, strict=False)}
    except NoMatchingPeftModuleError:
        meant = set()
    more, fewer = sorted(set(reached) - meant), sorted(meant - set(reached))
    if more or fewer:
        warnings.warn(
            "The adapter goes where the state_dict has tensors for it; there is an inconsistency between the PEFT config "
            f"and the provided state_dict. Only in the state_dict: {few(more)}. Only meant by the config: {few(fewer)}.",
            RuntimeWarning,
            stacklevel=3,
        )


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors under the keys of its file. state_dict: gathered values to take instead of the live ones."""
    base = unwrapped(model)
    roster = roster_of(base)
    if roster is None:
        raise ValueError("This model has no adapters.")
    if state_dict is None and sharded.flat(model):
        state_dict = model.state_dict()
    out = state_dict_of(roster, adapter_name, sharded.gathered(model, state_dict), meta=True)
    if save_embedding_layers is True:
        out = {**embedding_tensors(base, roster.adapters[adapter_name]), **out}
    if not isinstance(sharded.bare(model), PeftModel):  # injected without a wrapper: no wrapper's prefix
        out = {k.removeprefix(ROOT): v for k, v in out.items()}
    return out


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Fill an adapter from tensors; returns what was missing and what was not used, with a warning, as upstream does."""
    base = unwrapped(model)
    roster = roster_of(base)
    if roster is None or adapter_name not in roster.adapters:
        raise ValueError(f"Adapter {adapter_name!r} is not in this model.")
    adapter = roster.adapters[adapter_name]
    given = Loaded(adapter.config, dict(peft_model_state_dict), source="The state dict")
    fit = Fit(Plan(adapter_name, adapter.config, []), adapter, roster)
    if fit.fit(base, given, ignore_mismatched_sizes) and adapter.config.saved_embeddings:
        fit.fit(base, given, ignore_mismatched_sizes)
    pairs, missing, extra = fit.pairs, fit.missing, fit.extra
    refuse_base_weights(base, adapter, given.tensors, fit)
    wrong = check_values(pairs, "The state dict", ignore_mismatched_sizes)
    if sharded.flat(model):
        where = sharded.names_of_methods(model)
        model.load_state_dict({f"{where[id(s.method)]}.{s.attr}": t for s, t in pairs.values()}, strict=False)
        return _told(model, adapter_name, peft_model_state_dict, missing, extra)
    if wrong:
        warnings.warn(f"Keys of another size, which are not used: {few(wrong)}", stacklevel=2)
    refill(roster, adapter, {k: v for k, v in pairs.items() if k not in wrong})
    if missing:
        warnings.warn(f"Missing keys when loading adapter {adapter_name!r}: {', '.join(missing[:5])}", stacklevel=2)
    return _told(model, adapter_name, peft_model_state_dict, missing, extra, wrong)


def refuse_base_weights(model: nn.Module, adapter: Adapter, tensors: dict[str, Tensor], fit: Fit) -> None:
    """Raise where a state dict would change weights of the base, which the adapter's config does not declare as its own."""
    root = root_of(adapter.config)
    there = {p.disk_path: p for p in walk(model)} if len(fit.pairs) < len(tensors) else {}
    landed, wrong = set(fit.pairs), []
    for key, value in tensors.items():
        whole = key if key.startswith("base_model.") or "." not in key else root + key
        path, _, leaf = whole.removeprefix(root).rpartition(".")
        place = there.get(path.removesuffix(".base_layer"))
        own = getattr(place.module, leaf, None) if place is not None and whole not in landed else None
        if isinstance(own, Tensor) and not (
            own.shape == value.shape and value.to(own.device, own.dtype).equal(own.detach())
        ):
            wrong.append(key)
    if wrong:
        raise CheckpointError(
            f"The state dict holds weights of the base that the adapter's config does not train: {few(wrong)}. State them "
            "there (bias, modules_to_save), or leave them out."
        )


def _told(
    model: nn.Module,
    name: str,
    given: dict[str, Tensor],
    missing: list[str],
    extra: list[str],
    wrong: Sequence[str] = (),
) -> LoadResult:
    """What did not fit, as upstream names it: missing tensors with the adapter's name, unused keys as they were given."""
    root = "" if isinstance(sharded.bare(model), PeftModel) else ROOT
    as_given = {ROOT + k: k for k in given if not k.startswith("base_model.")}
    named = []
    for key in missing:
        head, _, leaf = key.removeprefix(root).rpartition(".")
        named.append(f"{head}.{name}.{leaf}" if leaf in ("weight", "bias") else f"{head}.{leaf}.{name}")
    return LoadResult(named, [as_given.get(k, k) for k in extra], list(wrong))


def load_peft_weights(
    model_id: str, device: str | None = None, key_mapping: dict[str, str] | None = None, **kwargs: object
) -> dict[str, Tensor]:
    """The tensors of a saved adapter, on `device` (the CPU by default), each with memory of its own."""
    found = read_adapter(model_id, PeftConfig(), key_mapping, False, kwargs, two_steps=False).tensors
    return {k: alone(t.to(device or t.device)) for k, t in found.items()}
