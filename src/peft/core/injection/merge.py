"""Adapters written into the base weights, and the weights brought back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

from torch import nn

from ...contract.managed import settle
from ...errors import Refusal
from ..acting.on_model import roster_of
from ..acting.roster import Roster
from ..adapted.layer import Adapted, adapted_layers
from ..adapted.merge import Record, tell_of_merged
from ..anatomy.ties import shared_parameters, shared_storages, state_tied, state_untied
from ..files.tensors import finite


def merge(model: nn.Module, names: list[str] | None = None, safe: bool = False, keep: bool = True) -> Iterator[str]:
    """Write adapters into the base weights, layer by layer, yielding paths. All refusals come before any write."""
    roster = roster_of(model)
    if roster is None:
        raise ValueError("This model has no adapters to merge.")
    with roster.gate.change():
        if roster.paused:
            raise ValueError(
                "Merging while disable_adapter() has taken merged adapters out of the base: close it first."
            )
        yield from _merge(model, roster, names, safe, keep)


def _merge(model: nn.Module, roster: Roster, names: list[str] | None, safe: bool, keep: bool) -> Iterator[str]:
    wanted = list(names) if names is not None else list(roster.chosen)
    roster.known(wanted)
    merged = (
        list(dict.fromkeys(n for x in adapted_layers(model) for n in x.merged_adapters)) if roster.merged_at else []
    )
    tell_of_merged(merged, wanted)
    roster.require_apart([*merged, *wanted])
    for name in wanted:
        for disk_path, m in roster.adapters[name].methods:
            if not m.mergeable:
                raise Refusal(
                    m.peft_type, f"{disk_path or 'the model'} (merge)", "its effect is no change of the base weights"
                )
            for attr, p in m.named_parameters():
                if p.is_floating_point() and not finite(p):
                    raise ValueError(
                        f"NaNs detected in adapter {name!r}: {disk_path}.{m.table.keys.get(attr, attr)} holds NaN or inf; "
                        "nothing was merged."
                    )
    layers = [x for x in adapted_layers(model) if any(n in x.methods and n not in x.merged_adapters for n in wanted)]
    settle(layer.kind.holder(layer.base_layer) for layer in layers)
    tied = shared_parameters(model)
    for layer in layers:
        layer.check_writable(tied)
    if safe:
        for layer in layers:
            layer.merged_values(layer.active_methods(_also(layer, wanted)))
    taken = None if keep else shared_storages(model)
    done: list[tuple[Adapted, Record]] = []
    try:
        for layer in layers:
            before = layer.record
            if not (taken is not None and layer.merge_in_place(wanted, taken)) and layer.merge_also(wanted, keep, tied):
                _untie_config(model, roster)
            done.append((layer, before))
            yield layer.path
    except ValueError:
        for layer, before in done:
            layer.merge_as(before)
        raise


def _also(layer: Adapted, wanted: list[str]) -> list[str]:
    return [*layer.merged_adapters, *(n for n in wanted if n in layer.methods and n not in layer.merged_adapters)]


def _untie_config(model: nn.Module, roster: Roster) -> None:
    if state_untied(model):
        roster.untied = True


def unmerge(model: nn.Module) -> None:
    """Restore the kept weights of every merged layer, and tied weights with them."""
    roster = roster_of(model)
    if roster is not None and not roster.merged_at and roster.unmerged is None:
        warnings.warn("Already unmerged, nothing to do.", stacklevel=3)
    with nullcontext() if roster is None else roster.gate.change():
        for layer in adapted_layers(model):
            layer.restore()
        if roster is not None and roster.untied:
            state_tied(model)
            roster.untied = False
        if roster is not None and roster.unmerged is not None:
            roster.unmerged = None
            roster.switch()


def pause(model: nn.Module) -> bool:
    """Take merged adapters out of the base until `resume` was called as often; all other calls run them unmerged.
    Returns False, and does nothing, where none is merged."""
    roster = roster_of(model)
    if roster is None or not (roster.paused or any(layer.merged for layer in adapted_layers(model))):
        return False
    with roster.gate.change():
        if not roster.paused:
            merged = tuple(dict.fromkeys(n for layer in adapted_layers(model) for n in layer.merged_adapters))
            unmerge(model)
            roster.unmerged = merged
            roster.switch()
        roster.paused += 1
    return True


def resume(model: nn.Module) -> None:
    """Undo one `pause`; with the last one, write what was merged into the base again."""
    roster = roster_of(model)
    if roster is None:
        return
    with roster.gate.change():
        roster.paused -= 1
        if roster.paused or roster.unmerged is None:
            return
        merged, roster.unmerged = [n for n in roster.unmerged if n in roster.adapters], None
        roster.switch()
        for _ in merge(model, merged):
            pass


def set_active(model: nn.Module, names: str | Sequence[str], inference_mode: bool = False) -> None:
    """Let one adapter act, or several together, and train exactly those. A merged model is unmerged before, with a
    warning: its weights would go on with the adapters that are in them."""
    roster = roster_of(model)
    if roster is None:
        raise ValueError("This model has no adapters.")
    names = [names] if isinstance(names, str) else list(names)
    roster.known(names)
    if roster.merged_at:
        warnings.warn("set_adapter: adapters are merged into this model. Unmerging the model first.", stacklevel=3)
        unmerge(model)
    roster.activate(names)
    roster.train_only(names, inference_mode)
