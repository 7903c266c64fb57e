"""Calls of a model side by side, and changes of its adapters' values one at a time, when no call is under way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PATIENCE = 1.0  # seconds for which a waiting change holds new calls back, before it lets them pass once more


class Gate:
    """A call that has begun sees one set of weights: what would change them waits until it has ended.

    A call within a call of the same thread passes, and so does a change made within a call: it waits for the other
    threads' calls only. Graphs do not ask: nothing in a compiled graph can wait.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._inside: dict[int, int] = {}  # thread -> how many calls within each other
        self._changing: int | None = None  # the thread that changes something
        self._depth = 0
        self._waiting: list[int] = []  # threads that want to

    def __reduce__(self) -> tuple[type[Gate], tuple[()]]:
        return type(self), ()  # a copy of a model is called by nobody

    def __deepcopy__(self, memo: object) -> Gate:
        return Gate()

    @property
    def called(self) -> bool:
        """Whether this thread is in a call."""
        return threading.get_ident() in self._inside

    @contextmanager
    def call(self) -> Iterator[None]:
        """Within, no other thread changes anything."""
        if torch.compiler.is_compiling():
            yield
            return
        me = threading.get_ident()
        with self._turn:
            if me not in self._inside and self._changing != me:
                self._turn.wait_for(lambda: not self._waiting and self._changing is None, PATIENCE)
                self._turn.wait_for(lambda: self._changing is None)
            self._inside[me] = self._inside.get(me, 0) + 1
        try:
            yield
        finally:
            with self._turn:
                self._inside[me] -= 1
                if not self._inside[me]:
                    del self._inside[me]
                    self._turn.notify_all()

    @contextmanager
    def change(self) -> Iterator[None]:
        """Within, no other thread is in a call. Raises RuntimeError where two calls wait for each other's end."""
        me = threading.get_ident()
        with self._turn:
            if self._changing != me:
                if me in self._inside and any(t in self._inside for t in self._waiting):
                    raise RuntimeError(
                        "Two calls of a model that run side by side both want to change its adapters, and each would wait for "
                        "the other to end. Replace, delete or merge adapters outside of calls."
                    )
                self._waiting.append(me)
                try:
                    self._turn.wait_for(lambda: self._changing is None and not self._inside.keys() - {me})
                finally:
                    self._waiting.remove(me)
                self._changing = me
            self._depth += 1
        try:
            yield
        finally:
            with self._turn:
                self._depth -= 1
                if not self._depth:
                    self._changing = None
                    self._turn.notify_all()
