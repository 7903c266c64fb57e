"""Gradient checkpointing: a block that is recomputed in backward runs with the adapters of its forward.

The checkpointing functions that transformers leaves on a model's blocks are wrapped (`bound`), so that a recompute puts
the mix of its forward back. What checkpoints otherwise is told when the mix has changed meanwhile (`check_recompute`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from .calls import Calls
from .mix import Mix

P = ParamSpec("P")
T = TypeVar("T")


class Recompute(Calls):
    """The mix that acts now, and how recomputes find the mix of their forward."""

    _seen: Mix | None = None  # the mix of the last forward outside a backward, of any thread

    def bound(self, checkpoint: Callable[..., T]) -> Callable[..., T]:
        """A checkpointing function whose recompute runs under the mix that its forward saw."""
        if getattr(checkpoint, "_peft_bound", None) is self:
            return checkpoint

        @functools.wraps(checkpoint)
        def run(function: Callable[..., object], *args: object, **kwargs: object) -> T:
            return checkpoint(self._under(self._whole(), function), *args, **kwargs)

        run.__dict__["_peft_bound"] = self
        return run

    def _under(self, mix: Mix, function: Callable[P, T]) -> Callable[P, T]:
        def under(*args: P.args, **kwargs: P.kwargs) -> T:
            was, self.here.bound = self.here.bound, True
            try:
                with self.using(mix):
                    return function(*args, **kwargs)
            finally:
                self.here.bound = was

        return under

    def bind_checkpointing(self, modules: Iterable[nn.Module]) -> None:
        """Wrap the checkpointing functions that transformers left on these modules."""
        for module in modules:
            checkpoint = module.__dict__.get("_gradient_checkpointing_func")
            if checkpoint is not None:
                module.__dict__["_gradient_checkpointing_func"] = self.bound(checkpoint)

    def _whole(self) -> Mix:
        """The mix, with the tokens that the running call holds."""
        mix, span = self.mix, self.here.span
        return mix if span is None or mix.span is not None else replace(mix, span=span)

    def check_recompute(self) -> None:
        """A recompute that nothing bound, under another mix than the last forward's, would be silently wrong."""
        mix = self._whole()
        if torch._C._current_graph_task_id() == -1:
            self.here.seen = self._seen = mix
            return
        seen = self.here.seen or self._seen  # on a device, backward runs in a thread that has seen no forward
        if not self.here.bound and seen is not None and mix != seen:
            raise RuntimeError(
                f"A checkpointed block is recomputed in backward with adapters {list(mix.active)}, but its forward "
                f"ran with {list(seen.active)}. Call backward() before switching adapters, or enable checkpointing "
                "through model.gradient_checkpointing_enable(), whose blocks remember their adapters."
            )
