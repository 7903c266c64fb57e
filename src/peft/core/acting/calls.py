"""Who acts belongs to the call: a context's mix lies over the model's own, for the thread or task that opened it alone.

The open ones stand in one context variable, the innermost last. Each is taken out by itself when it is closed, in
whatever order, and a closed one acts for nobody, not even for a task that was started inside it.

torch.compile knows no context variables. In a graph the innermost overlay that this thread opened is read from the
thread's own attributes, which graphs guard on. Tasks of one thread look alike there, so while an overlay is open that
an event loop may carry elsewhere, a graph breaks here and asks outside (with `fullgraph` that is torch's error).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

from .gate import Gate
from .mix import Mix
from .per_thread import PerThread
from .span import Span


class Overlay:
    """A mix that acts for those who have it in their context, until it is closed.

    enabled: whether adapters may act at all. held: by a caller around calls, not by one call.
    """

    def __init__(self, calls: Calls, mix: Mix, enabled: bool, held: bool) -> None:
        self.calls, self.mix, self.enabled, self.held, self.closed = calls, mix, enabled, held, False
        self.outer: Overlay | None = None  # in a graph: what it lies on


OPEN: ContextVar[tuple[Overlay, ...]] = ContextVar("peft_overlays", default=())


class Here:
    """What each thread has for itself."""

    def __init__(self) -> None:
        self.overlay: Overlay | None = None  # what a graph reads: the innermost that this thread opened
        self.span: Span | None = None  # the tokens that the running call holds: core/acting/watch.py
        self.bound = False  # inside a block whose recompute remembers its mix
        self.seen: Mix | None = None  # the mix of the thread's last forward outside a backward


class Calls:
    """The mix that acts in this call: that of its innermost open overlay, else the model's own."""

    def __init__(self) -> None:
        self.own = Mix()
        self.own_enabled = True
        self.threads = PerThread(Here)
        self.gate = Gate()
        self.abroad = False  # whether an overlay is open that tasks or threads of an event loop may share or not
        self._travelling: set[Overlay] = set()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "abroad": False, "_travelling": set()}  # a copy has the model's own mix

    @property
    def here(self) -> Here:
        return self.threads.held

    @property
    def mix(self) -> Mix:
        if not torch.compiler.is_compiling():
            return self.outside_graphs()
        found = self.overlay
        return self.own if found is None else found.mix

    @mix.setter
    def mix(self, mix: Mix) -> None:
        self.own = mix

    def outside_graphs(self) -> Mix:
        """The mix, where it is known that no graph is being made."""
        open_ = OPEN.get()
        if not open_ or (found := self._innermost(open_)) is None:
            return self.own
        return found.mix

    @property
    def span(self) -> Span | None:
        """The tokens that the running call holds: in a recompute those of its forward."""
        return self.mix.span or self.here.span

    @property
    def enabled(self) -> bool:
        """Whether adapters may act, in this call."""
        found = self.overlay
        return self.own_enabled if found is None else found.enabled

    @property
    def overlay(self) -> Overlay | None:
        if torch.compiler.is_compiling() and not self.abroad:
            found = self.here.overlay
            return None if found is None or found.closed else found
        open_ = OPEN.get()
        return self._innermost(open_) if open_ else None

    def _innermost(self, open_: tuple[Overlay, ...]) -> Overlay | None:
        for overlay in reversed(open_):
            if overlay.calls is self and not overlay.closed:
                return overlay
        return None

    def open(self, mix: Mix, enabled: bool | None = None, held: bool = False) -> Overlay:
        """Lay a mix over the others until `close`. held: by the caller, across whatever else runs meanwhile."""
        overlay = Overlay(self, mix, self.enabled if enabled is None else enabled, held)
        if not torch.compiler.is_compiling():
            before = OPEN.get()
            if held and (_in_event_loop() or self.here.overlay is not self._innermost(before)):
                self._travelling.add(overlay)
                self.abroad = True
            OPEN.set((*before, overlay))
        else:
            overlay.outer = self.here.overlay
        self.here.overlay = overlay
        return overlay

    def steady(self) -> AbstractContextManager[None]:
        """For one call: within, whoever acts now acts, whatever the model is switched to meanwhile."""
        if torch.compiler.is_compiling():
            return nullcontext()  # a graph is of one mix
        overlay = self.overlay
        if overlay is None:
            return self.using(self.own)
        return self.using(overlay.mix) if overlay.held else nullcontext()

    def close(self, overlay: Overlay) -> None:
        outer = overlay.outer
        if not torch.compiler.is_compiling():
            overlay.closed = True
            OPEN.set(tuple(o for o in OPEN.get() if not o.closed))
            if overlay in self._travelling:
                self._travelling.discard(overlay)
                self.abroad = bool(self._travelling)
            outer = self._innermost(OPEN.get())
        self.here.overlay = outer

    @contextmanager
    def using(self, mix: Mix, enabled: bool | None = None, held: bool = False) -> Iterator[None]:
        """Within, this mix acts, for this call alone."""
        overlay = self.open(mix, enabled, held)
        try:
            yield
        finally:
            self.close(overlay)
            if mix.rows is not None:
                mix.rows.scratch.clear()


def _in_event_loop() -> bool:
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and asyncio._get_running_loop() is not None
