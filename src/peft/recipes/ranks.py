"""One run in several processes (torchrun, accelerate launch): who speaks and writes, and how all of them end together.

The first process (rank 0) prints, decides and writes; the others do the same work with their part of the rows. What only
one of them can find out (an output that is refused, a file that is missing on one machine) is told to all before the next
thing that they do together, so that nobody waits for a process that has ended.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
SAID = "peft/said/{}"  # in the store that the processes share: how many of them have begun to say what was wrong


class ElsewhereError(RuntimeError):
    """Another process of the run has failed, as the message says."""


# -- who ----------------------------------------------------------------------------------------------------------------
def together() -> bool:
    """Whether this process works with others."""
    dist = sys.modules.get(
        "torch.distributed"
    )  # nobody has met before it is loaded: a command that only prints stays light
    return dist is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _dist() -> ModuleType:
    import torch.distributed

    return torch.distributed


def count() -> int:
    """How many processes a launcher has started, also before they have met."""
    return _dist().get_world_size() if together() else _launched("WORLD_SIZE", 1)


def rank() -> int:
    """Which of them this is, from 0."""
    return _dist().get_rank() if together() else _launched("RANK", 0) if count() > 1 else 0


def is_first() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0


def _launched(name: str, otherwise: int) -> int:
    """A number that a launcher has set; the variables of one process alone say nothing."""
    found = os.environ.get(name, "")
    return int(found) if "LOCAL_RANK" in os.environ and found.isdigit() else otherwise


# -- together -----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def agreed(alone: bool = True) -> Iterator[None]:
    """Work that each process does by itself: an error of one is an error of all.

    alone: False where the work waits for the other processes. Then none can be told, and the launcher ends them.
    """
    if not (alone and together()):
        yield
        return
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    told: list[Any] = [None] * count()
    _dist().all_gather_object(told, None if failed is None else (isinstance(failed, UserError), _message(failed)))
    if failed is not None:
        raise failed
    for number, found in enumerate(told):
        if found is not None:
            raise UserError(found[1]) if found[0] else ElsewhereError(f"process {number}: {found[1]}")


def on_first(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, in all of them; its error, too."""
    found: list[Any] = [None]
    with agreed():
        if is_first():
            found[0] = work()
    if together():
        _dist().broadcast_object_list(found, 0)
    value: T = found[0]
    return value


def anywhere(flag: bool) -> bool:
    """Whether `flag` holds in any of the processes."""
    return any(gathered(flag))


def gathered(value: T) -> list[T]:
    """The value of every process, by rank."""
    if not together():
        return [value]
    found: list[Any] = [None] * count()
    _dist().all_gather_object(found, value)
    return found


def mean(value: Tensor | None) -> Tensor | None:
    """The mean of a number over all processes; None where it is None, which it is everywhere or nowhere."""
    if value is None or not together():
        return value
    value = value.detach().clone()
    _dist().all_reduce(value)
    return value / count()


def pooled(scores: Mapping[str, float] | None) -> dict[str, float]:
    """The scores on all rows from those on each process's share, which are means over as many `rows` or `tokens`.

    A process without rows gives None.
    """
    parts = [part for part in gathered(None if scores is None else dict(scores)) if part is not None]
    sizes = [next(part[n] for n in ("tokens", "rows") if n in part) for part in parts]
    total = sum(sizes)
    return {
        name: sum(part[name] for part in parts)
        if name in ("tokens", "rows")
        else sum(part[name] * size for part, size in zip(parts, sizes) if size) / max(1, total)
        for name in parts[0]
    }


# -- the end ------------------------------------------------------------------------------------------------------------
def _message(error: BaseException) -> str:
    # str() of a KeyError is the repr of its message
    found = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return found.strip() or type(error).__name__


def speaks() -> bool:
    """Whether this process is the first to ask, of all that end with an error: the one that says what was wrong.

    Those that come later were told of it, or wait for one that is gone.
    """
    if count() == 1:
        return True
    with contextlib.suppress(Exception):
        store = _store()
        if store is not None:
            return int(store.add(SAID.format(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), 1)) == 1
    return is_first()


def _store() -> Any:
    """What the processes share: the launcher's, which is there before they have met, or that of their group."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return _dist().TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
    return _dist().distributed_c10d._get_default_store() if _dist().is_initialized() else None


def leave() -> None:
    """Take leave of the others, when all is done."""
    if together():
        _dist().barrier()
        _dist().destroy_process_group()
