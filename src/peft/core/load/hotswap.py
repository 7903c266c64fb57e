"""Putting a saved adapter in the place of a loaded one: the result equals a fresh load, or nothing is touched.

Where the new adapter has the same shapes and settings, its values are copied into the old tensors and a compiled model
runs on. Where not, the old adapter's methods give way to new ones, and a compiled model compiles again, unless its
twins were padded before: `prepare_model_for_compiled_hotswap` gives every factored delta one rank and the scale 1, and
swaps then only copy s·B and A, padded with zeros.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...config import PeftConfig
from ...contract import managed
from ...contract.capabilities import TwoFactors
from ...contract.managed import class_of
from ...contract.method import Method
from ...errors import CheckpointError, Refusal, about_a_file
from ...registry import method
from ..acting.on_model import roster_of
from ..acting.roster import Adapter, Roster
from ..adapted.layer import adapted_layers
from ..files import header
from ..files.header import Loaded, check_base
from ..files.keys import assign, check_fit, modules_in_file
from ..files.sharded import unwrapped, unwrapped_name
from ..injection.plan import Plan, plan
from ..injection.replace import replace, unused_name
from ..injection.shared import refill, rewriting
from .load import Fit, checked, read_adapter

T = TypeVar("T")
FREE = (*header.FREE, "task_type", "seed")


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise ValueError where one adapter cannot stand in the other's place: only within one method."""
    first, second = (getattr(c.peft_type, "value", c.peft_type) for c in (config0, config1))
    if first != second:
        raise ValueError(f"Incompatible PEFT types found: {first} and {second}")


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Replace the loaded adapter `adapter_name` by a saved one, under the same name."""
    loaded = read_adapter(model_name_or_path, None, kwargs.pop("key_mapping", None), True, kwargs)
    swap(model, loaded, adapter_name)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "",
) -> None:
    """The same from tensors, named as in a file or with the adapter's name inside (`…lora_A.default.weight`)."""
    tensors = {_without(unwrapped_name(k), adapter_name): v for k, v in state_dict.items()}
    loaded = Loaded(copy.deepcopy(config), tensors, source="The state dict")
    swap(model, loaded, adapter_name, modules_in_file(tensors, config))


def reload(model: nn.Module, loaded: Loaded, name: str) -> None:
    """New weights for a loaded adapter, as when training resumes; other settings make it a swap."""
    base, roster = _parts(model)
    adapter = roster.adapters[name]
    before, after = ({k: v for k, v in c.to_dict().items() if k not in FREE} for c in (adapter.config, loaded.config))
    if before != after or adapter.padded:
        swap(model, loaded, name)
        return
    fit = Fit(Plan(name, adapter.config, []), adapter, roster)
    with about_a_file(loaded.source or "The adapter"):
        known = dataclasses.replace(loaded, tensors=dict(loaded.tensors))
        for held in (known, loaded) if loaded.fetch is not None else (known,):
            if held is loaded:
                loaded.read_values()
            if fit.fit(base, held, False) and not adapter.config.saved_embeddings:
                swap(model, loaded, name)  # a part that it does not have yet
                return
            fit.fit(base, held, False)
            check_fit(fit.pairs, fit.missing, fit.extra, loaded.source)
    refill(roster, adapter, fit.pairs)


def _without(key: str, adapter: str) -> str:
    head, found, tail = key.rpartition(f".{adapter}")
    return head + tail if found and tail in ("", ".weight", ".bias") else key


def swap(model: nn.Module, loaded: Loaded, name: str, only: set[str] | None = None) -> None:
    """Plan the new adapter beside the old, fill it, check everything, and only then change the model.

    only: the paths it goes to, where they are known better than by the config's target names. What set_scale had asked
    of the old adapter is not asked of the new one.
    """
    model, roster = _parts(model)
    roster.known([name])
    old = roster.adapters[name]
    check_hotswap_configs_compatible(old.config, loaded.config)
    for layer in adapted_layers(model):
        if name in layer.merged_adapters:
            raise ValueError(f"Adapter {name!r} is merged into {layer.path}: call unmerge_adapter() before swapping.")
    loaded.config.inference_mode = old.config.inference_mode

    def check(fit: Fit) -> None:
        check_base(model, loaded, fit.adapter)
        check_fit(fit.pairs, fit.missing, fit.extra, loaded.source)

    with about_a_file(loaded.source or "The adapter"):
        fit = checked(
            model,
            loaded,
            unused_name(roster),
            check,
            init=False,
            autocast_adapter_dtype=has_fp32_masters(old),
            only=only or None,
        )
    new, planned = fit.adapter, fit.planned
    assign(fit.pairs, new)
    with roster.gate.change():
        if old.padded:
            _into_padded(old, new, name)
            return
        if not (alike := _alike(old.methods, new.methods)):
            _check_whole(old, name)
        for _, m in old.methods:
            m.multiplier = 1.0
        if alike:
            with rewriting(roster, old):
                _copy((a for _, a in old.methods), (b for _, b in new.methods))
            roster.configs[name] = old.config = loaded.config
        else:
            replace(model, roster, name, planned)


def _check_whole(adapter: Adapter, name: str) -> None:
    """Raise where the adapter is split over processes: what takes its place would be outside of what shards the model."""
    managed.settle(m for _, m in adapter.methods)
    if any(managed.split(p) or managed.partitioned(p) for p in adapter.parameters()):
        raise CheckpointError(
            f"Adapter {name!r} is split over processes, and the new one has other places, shapes or settings: only values "
            "can be swapped there. Load it before sharding the model."
        )


def _parts(model: nn.Module) -> tuple[nn.Module, Roster]:
    base = unwrapped(model)
    roster = roster_of(base)
    if roster is None:
        raise ValueError("This model has no adapters to swap.")
    return base, roster


def has_fp32_masters(adapter: Adapter) -> bool:
    """Whether the adapter keeps fp32 masters on a half-precision base."""
    return all(p.dtype not in (torch.float16, torch.bfloat16) for p in adapter.parameters())


OF_THE_MODEL = ("training", "multiplier")  # what the model's user sets


# -- in place ---------------------------------------------------------------------------------------------------------------
def _settings(m: nn.Module) -> dict[str, object]:
    """What a method computes with besides its tensors."""
    plain = (bool, int, float, str, tuple, list, dict, type(None))
    return {
        k: v for k, v in vars(m).items() if not k.startswith("_") and k not in OF_THE_MODEL and isinstance(v, plain)
    }


def _alike(old: list[tuple[str, Method]], new: list[tuple[str, Method]]) -> bool:
    """Whether values are all that differs: same places, classes, shapes and settings."""
    if [s for s, _ in old] != [s for s, _ in new]:
        return False
    for (_, a), (_, b) in zip(old, new):
        for (n, x), (k, y) in zip(_all(a), _all(b)):
            if n != k or class_of(x) is not class_of(y) or _settings(x) != _settings(y):
                return False
        if {n: t.shape for n, t in _tensors(a).items()} != {n: t.shape for n, t in _tensors(b).items()}:
            return False
    return True


def _all(m: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(m.named_modules())


def _tensors(m: nn.Module) -> dict[str, Tensor]:
    return {**dict(m.named_parameters()), **dict(m.named_buffers())}


def _copy(old: Iterable[Method], new: Iterable[Method]) -> None:
    old = list(old)
    managed.settle(old)
    with torch.no_grad():
        for a, b in zip(old, new):
            values = _tensors(b)
            for n, t in _tensors(a).items():
                managed.fill(t, managed.whole(values[n]))
            for (_, x), (_, y) in zip(_all(a), _all(b)):
                if isinstance(x, Method):
                    x.config = y.config


# -- padded twins -----------------------------------------------------------------------------------------------------------
def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: PeftConfig | dict[str, PeftConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Pad the loaded adapters' factors, so that later swaps of ranks up to `target_rank` recompile nothing.

    Call it after the first adapter is loaded and before torch.compile. target_rank: by default the largest rank
    present, or in `config` (a config, or configs by name). check_compiled: "error", "warn" or "ignore" if the model
    is compiled already.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiled should be 'error', 'warn' or 'ignore', got {check_compiled!r}.")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        text = "Call prepare_model_for_compiled_hotswap before compiling the model: padding makes it compile again."
        if check_compiled == "error":
            raise ValueError(text)
        if check_compiled == "warn":
            warnings.warn(text, stacklevel=2)
    model, roster = _parts(model)
    plans = []
    configs = list(config.values()) if isinstance(config, dict) else [config] if config is not None else []
    for name, adapter in roster.adapters.items():
        own = _own(adapter)
        pairs = {path: m.two_factors() for path, m in own.items() if isinstance(m, TwoFactors)}
        held_by = method(adapter.config.peft_type)
        if not pairs or len(pairs) < len(own) or not issubclass(held_by, TwoFactors):
            raise Refusal(str(adapter.config.own_type), f"adapter {name!r}", "only two-factor deltas can be padded")
        known = [*(p[0].shape[0] for p in pairs.values()), *(r for c in configs for r in _ranks(c))]
        rank = target_rank if target_rank is not None else max(known)
        largest = max(p[0].shape[0] for p in pairs.values())
        if largest > rank:
            raise ValueError(f"target_rank={rank} is smaller than the rank {largest} of adapter {name!r}.")
        paths = dict(zip(own, adapter.targeted))
        held = held_by.config_for_ranks(adapter.config, dict.fromkeys(paths.values(), rank))
        planned = plan(
            model,
            held,
            unused_name(roster),
            init=False,
            autocast_adapter_dtype=has_fp32_masters(adapter),
            only=None if getattr(held, "target_parameters", None) else set(adapter.targeted),
        )
        twin = planned.adapter()
        twins = _own(twin)
        for disk_path, m in own.items():
            _hold(twins[disk_path], m)
        _copy(
            (m for s, m in twin.methods if m is not twins.get(s)),
            (m for s, m in adapter.methods if m is not own.get(s)),
        )
        plans.append((name, planned))
    with roster.gate.change():
        for name, planned in plans:
            trains = {key: p.requires_grad for key, p in _named(roster.adapters[name])}
            replace(model, roster, name, planned)
            for key, p in _named(roster.adapters[name]):
                p.requires_grad_(trains.get(key, p.requires_grad))
            roster.adapters[name].padded = True


def _named(adapter: Adapter) -> list[tuple[tuple[str, str], nn.Parameter]]:
    return [((path, n), p) for path, m in adapter.methods for n, p in m.named_parameters()]


def _ranks(config: Any) -> list[int]:
    return [config.r, *(getattr(config, "rank_pattern", None) or {}).values()]


def _own(adapter: Adapter) -> dict[str, Method]:
    return dict(adapter.own())


def _hold(twin: Method, m: Method | None) -> None:
    """s·B and A of `m`, or nothing, into a padded twin; what set_scale asked of `m` stays a factor of its own."""
    with managed.changing(twin), managed.present(m) if m is not None else nullcontext():
        _hold_whole(twin, m)


def _hold_whole(twin: Method, m: Method | None) -> None:
    assert isinstance(twin, TwoFactors)
    A0, B0, _ = twin.two_factors()
    A, B = torch.zeros_like(A0), torch.zeros_like(B0)
    bias, twin.multiplier = None, 1.0
    if m is not None:
        assert isinstance(m, TwoFactors)
        twin.multiplier, m.multiplier = m.multiplier, 1.0
        a, b, s = m.two_factors()
        A[: a.shape[0]] = a
        B[:, : b.shape[1]] = s * b
        bias = m.bias_change()
        m.multiplier = twin.multiplier
    with torch.no_grad():
        twin.set_factors(A.detach(), B.detach(), None if bias is None else bias.detach())


def _into_padded(old: Adapter, new: Adapter, name: str) -> None:
    twins, fresh = _own(old), _own(new)
    beyond = [s for s in fresh if s not in twins]
    if beyond:
        raise CheckpointError(
            f"The adapter reaches {', '.join(beyond[:5])}, where the prepared adapter {name!r} has no room."
        )
    for disk_path, m in fresh.items():
        twin = twins[disk_path]
        if not isinstance(m, TwoFactors) or not isinstance(twin, TwoFactors):
            raise Refusal(str(old.config.own_type), disk_path, "only two-factor deltas fit into padded twins")
        rank, room = m.two_factors()[0].shape[0], twin.two_factors()[0].shape[0]
        if rank > room:
            raise ValueError(f"{disk_path} has rank {rank}, its padded twin was prepared for {room}.")
        if (m.bias_change() is None) != (twin.bias_change() is None):
            raise ValueError(f"{disk_path}: one of the adapters trains a bias of its delta, the other does not.")
    rest_old = [(s, m) for s, m in old.methods if m is not twins.get(s)]
    rest_new = [(s, m) for s, m in new.methods if m is not fresh.get(s)]
    if not _alike(rest_old, rest_new):
        raise ValueError(f"Adapter {name!r} and the new one bring different modules besides their deltas.")
    _copy((m for _, m in rest_old), (m for _, m in rest_new))
    for disk_path, twin in twins.items():
        _hold(twin, fresh.get(disk_path))
