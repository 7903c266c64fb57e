"""An object for each thread, which graphs may write, too."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class PerThread(threading.local, Generic[T]):
    """`held`: what `make` gave for this thread. A copy of a model starts anew.

    The attributes of the object are what changes, not this one's own: torch.compile reads and guards a thread's own
    attributes, but loses what a graph writes there where it breaks.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self.make, self.held = make, make()

    def __reduce__(self) -> tuple[type[PerThread[T]], tuple[Callable[[], T]]]:
        return type(self), (self.make,)
