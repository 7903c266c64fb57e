"""What a job tells while it runs: small values, given to one callable. How they look is the listener's business."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

if TYPE_CHECKING:
    from ..config import Fields

T = TypeVar("T")


class Counted(TypedDict):
    """The three counts of an adapter, as the metrics file has them."""

    trainable: int
    total: int
    trainable_percent: float
    updated: int
    updated_percent: float
    rank: int | None
    layers_by_rank: dict[str, int]


class Metrics(TypedDict):
    """What the metrics file says of a finished run. Scores are None where no rows are held out or none were asked for."""

    job: Fields
    counts: Counted
    adapter_bytes: int
    before: Mapping[str, float] | None
    after: Mapping[str, float] | None
    steps: int
    processes: int
    rows_of_a_step: int
    final_loss: float | None
    seconds: dict[str, float]
    memory_bytes: dict[str, int]
    history: list[dict[str, float]]
    versions: dict[str, str]


@dataclass(frozen=True)
class RowsRead:
    """The data was read; `held_out` is None where no rows are held out."""

    train: int
    held_out: int | None


@dataclass(frozen=True)
class Skipped:
    """Rows of a file that cannot be right are left out: how many of how many, and the first of them with its fault."""

    name: str
    count: int
    rows: int
    first: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Began:
    """Work of unknown length begins."""

    title: str


@dataclass(frozen=True)
class Ended:
    """The work of that title is over, by success or by an error."""

    title: str


@dataclass(frozen=True)
class Progress:
    """Work that can be counted; told at its beginning (`done` is 0) and after each piece."""

    title: str
    done: int
    total: int


@dataclass(frozen=True)
class Target:
    """One place that the method adapts: its path in the base, its layer's kind, its weight's shape, the parameters."""

    path: str
    kind: str
    shape: tuple[int, ...] | None
    parameters: int


@dataclass(frozen=True)
class Plan:
    """What will be adapted: `base_parameters` is the size of the base, `steps` the length of the training."""

    method: str
    model: str
    task: str
    targets: tuple[Target, ...]
    base_parameters: int
    steps: int
    passed_over: Mapping[str, str] = field(default_factory=dict)  # layers that cannot be adapted, and why

    @property
    def added(self) -> int:
        return sum(target.parameters for target in self.targets)


@dataclass(frozen=True)
class Shared:
    """Several processes train together: each reads `rows` at a time, `accumulated` times for an optimizer step."""

    processes: int
    rows: int
    accumulated: int

    @property
    def step(self) -> int:
        """How many rows an optimizer step sees in all."""
        return self.processes * self.rows * self.accumulated


@dataclass(frozen=True)
class BaseScored:
    """The base's scores on the held-out rows, before anything was trained."""

    scores: Mapping[str, float]


@dataclass(frozen=True)
class Adopted:
    """The output folder is one of an earlier version: the run goes on, and what that version wrote is left there."""

    folder: Path


@dataclass(frozen=True)
class GoingOn:
    """An interrupted run is taken up after this step."""

    step: int
    steps: int


@dataclass(frozen=True)
class Step:
    """An optimizer step was taken; told once before the first, too."""

    step: int
    steps: int


@dataclass(frozen=True)
class Logged:
    """What the Trainer logs now and then: its numbers, the memory in bytes, the seconds that are left at this pace."""

    step: int
    steps: int
    numbers: Mapping[str, float]
    memory: Mapping[str, int]
    seconds_left: float


@dataclass(frozen=True)
class TrainingEnded:
    """The last step is taken, or the run stops early."""


@dataclass(frozen=True)
class StopAsked:
    """A signal asks the run to stop, which it does after the current step."""


@dataclass(frozen=True)
class NoPlot:
    """The loss is not drawn, because this package is missing."""

    package: str


@dataclass(frozen=True)
class Stopped:
    """The run stopped between two steps and can go on from there. `asked`: by a signal, not by a number of steps."""

    step: int
    steps: int
    asked: bool


@dataclass(frozen=True)
class Finished:
    """The run is over: its metrics, and where the adapter, the metrics and the plot (if there is one) are."""

    metrics: Metrics
    adapter: Path
    metrics_file: Path
    plot: Path | None


@dataclass(frozen=True)
class Answered:
    """A few held-out rows as (what was asked, what the adapted model answers)."""

    rows: tuple[tuple[str, str], ...]


Event = (
    RowsRead
    | Skipped
    | Began
    | Ended
    | Progress
    | Plan
    | Shared
    | BaseScored
    | Adopted
    | GoingOn
    | Step
    | Logged
    | TrainingEnded
    | StopAsked
    | NoPlot
    | Stopped
    | Finished
    | Answered
)
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener of those who do not listen."""


def track(items: Sequence[T], title: str, on_event: OnEvent) -> Iterator[T]:
    """The items one by one, with their progress told."""
    on_event(Progress(title, 0, len(items)))
    for done, item in enumerate(items, 1):
        yield item
        on_event(Progress(title, done, len(items)))


@contextmanager
def working(title: str, on_event: OnEvent) -> Iterator[None]:
    """Tells that the block begins and that it has ended."""
    on_event(Began(title))
    try:
        yield
    finally:
        on_event(Ended(title))
