"""Methods that follow the optimiser's steps (a rank budget that falls): who tells them of a step, and that somebody does.

A loop of one's own calls `update_and_allocate(model, step)` between `optimizer.step()` and `zero_grad()`. Under
transformers' Trainer, and trainers derived from it, the adapters are told by a hook on the optimizer's step, with the
Trainer's own count from 1; a call by hand, from a callback say, takes its place from then on. An adapter that trains
past `tinit` in a loop that tells it nothing gives a warning.
"""

from __future__ import annotations

import copy
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ...contract.capabilities import Scheduled
from ...registry import method
from ..acting.on_model import roster_of
from ..acting.roster import Adapter, Roster


@dataclass(eq=False)
class Watched:
    """What is known of a scheduled adapter's training."""

    roster: weakref.ref[Roster]
    name: str
    steps: int = 0  # of optimizers that hold its parameters
    by_hand: bool = False
    warned: bool = False
    undo: Callable[[], None] | None = None  # takes back the one step that the hook told before a call by hand did
    trainers: weakref.WeakKeyDictionary[Optimizer, Any] = field(default_factory=weakref.WeakKeyDictionary)

    @property
    def adapter(self) -> Adapter | None:
        roster = self.roster()
        return None if roster is None else roster.adapters.get(self.name)


_watched: dict[tuple[int, str], Watched] = {}  # by the id of the roster, and the adapter's name
_hooked = False


def watch(roster: Roster, name: str) -> None:
    """Follow a new adapter's training, if its method has a schedule."""
    global _hooked
    if not issubclass(method(roster.adapters[name].config.peft_type), Scheduled):
        return
    for key in [k for k, w in _watched.items() if w.adapter is None]:
        del _watched[key]
    _watched[id(roster), name] = Watched(weakref.ref(roster), name)
    if not _hooked:
        register_optimizer_step_post_hook(_stepped)
        _hooked = True


def update_and_allocate(model: nn.Module, global_step: int, adapter_name: str | None = None) -> None:
    """Tell scheduled methods (AdaLoRA) of a step of the optimiser: call it after `optimizer.step()`, before `zero_grad()`.

    model: with or without a wrapper, as `inject_adapter_in_model` leaves it. global_step: counted from 0 or from 1 over
    the whole training; the schedule ends at `total_step - tfinal`. adapter_name: one adapter; those that act, by default.

    Raises ValueError for a model without adapters, RuntimeError where the adapter's parameters have no gradients.
    """
    roster = roster_of(model)
    if roster is None:
        raise ValueError("This model has no adapters: there is no schedule to follow.")
    names = roster.chosen if adapter_name is None else (adapter_name,)
    roster.known(list(names))
    for name in names:
        adapter = roster.adapters[name]
        if issubclass(method(adapter.config.peft_type), Scheduled):
            watched = _watched.get((id(roster), name))
            if watched is not None and watched.roster() is roster:
                if watched.undo is not None:
                    watched.undo()
                watched.by_hand, watched.undo = True, None
            _tell(adapter, global_step)


def _tell(adapter: Adapter, step: int) -> None:
    cls = method(adapter.config.peft_type)
    assert issubclass(cls, Scheduled)
    cls.after_step({disk_path: m.nested()[-1] for disk_path, m in adapter.own()}, adapter.config, step)


def _stepped(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
    """After each step of any optimizer."""
    for watched in list(_watched.values()):
        adapter = watched.adapter
        if adapter is None or watched.by_hand or not _holds(optimizer, adapter):
            continue
        watched.steps, watched.undo = watched.steps + 1, None
        if optimizer not in watched.trainers:
            watched.trainers[optimizer] = _trainer_above()
        trainer = watched.trainers[optimizer]
        if trainer is not None and (trainer := trainer()) is not None:
            step = trainer.state.global_step + 1
            if watched.steps == 1:
                watched.undo = _undo(adapter)
                _check_length(adapter, trainer.state.max_steps)
            _tell(adapter, step)
        elif watched.steps > getattr(adapter.config, "tinit", 0) + 1 and not watched.warned:
            watched.warned = True
            warnings.warn(
                f"Adapter {watched.name!r} ({method(adapter.config.peft_type).peft_type}) has trained {watched.steps} steps, but "
                "nothing tells it of them, so that its budget stays as it is: call model.update_and_allocate(step), or "
                "peft.update_and_allocate(model, step) for a model without a wrapper, between optimizer.step() and "
                "optimizer.zero_grad().",
                stacklevel=4,
            )


def _holds(optimizer: Optimizer, adapter: Adapter) -> bool:
    """Whether the optimizer trains the adapter: its parameters, or a buffer that they are views of."""
    first = next((p for _, m in adapter.own() for p in m.parameters() if p.requires_grad), None)
    if first is None or first.grad is None:
        return False
    place = first.untyped_storage().data_ptr()
    return any(
        p is first or (isinstance(p, Tensor) and not p.is_meta and p.untyped_storage().data_ptr() == place)
        for group in optimizer.param_groups
        for p in group["params"]
    )


def _trainer_above() -> weakref.ref[Any] | None:
    """The transformers Trainer in whose training loop this runs."""
    frame = sys._getframe()
    module = sys.modules.get("transformers.trainer")
    trainer = getattr(module, "Trainer", None)
    while trainer is not None and frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_varnames[:1] == ("self",) else None
        if isinstance(owner, trainer):
            return weakref.ref(owner)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _check_length(adapter: Adapter, steps: int) -> None:
    total = getattr(adapter.config, "total_step", None)
    last = None if total is None else total - getattr(adapter.config, "tfinal", 0)
    if last is not None and steps < last:
        warnings.warn(
            f"The Trainer runs {steps} steps, but the adapter's budget is to fall until step {last} (total_step={total} "
            "less tfinal): its target is not reached. Set total_step to the number of optimizer steps.",
            stacklevel=5,
        )


def _undo(adapter: Adapter) -> Callable[[], None]:
    """What puts the adapter back to how it is now: its trained values, its buffers, what it has observed."""
    kept = []
    for _, m in adapter.own():
        inner: Any = m.nested()[-1]
        values = {n: t.detach().clone() for n, t in (*inner.named_parameters(), *inner.named_buffers())}
        kept.append((inner, values, dict(getattr(inner, "importance", {}))))
    pattern = copy.copy(getattr(adapter.config, "rank_pattern", None))

    @torch.no_grad()
    def undo() -> None:
        for inner, values, importance in kept:
            for name, t in (*inner.named_parameters(), *inner.named_buffers()):
                t.copy_(values[name])
            if hasattr(inner, "importance"):
                inner.importance = importance
        if hasattr(adapter.config, "rank_pattern"):
            adapter.config.rank_pattern = pattern

    return undo
