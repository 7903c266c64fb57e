"""What a row of the table is made of: cases, the figures they measure, and what a figure should reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Reach:
    """A goal, as text and as a test of (our median, upstream's median or None); None means it cannot be told."""

    text: str
    test: Callable[[float, float | None], bool | None]


def at_most(value: float) -> Reach:
    return Reach(f"≤ {value:g}", lambda ours, _: ours <= value)


def at_least(value: float) -> Reach:
    return Reach(f"≥ {value:g}", lambda ours, _: ours >= value)


def near(value: float, share: float) -> Reach:
    return Reach(f"{value:g} ± {share:.0%}", lambda ours, _: ours <= value * (1 + share))


def faster(times: float) -> Reach:
    """By this factor below upstream."""
    return Reach(f"≥ {times:g} × faster", lambda ours, theirs: None if theirs is None else theirs >= times * ours)


AHEAD = Reach("ahead", lambda ours, theirs: None if theirs is None else ours <= theirs)


@dataclass(frozen=True)
class Figure:
    """One number of a case. The unit "×" is a ratio to a floor that was measured beside it."""

    unit: str
    reach: tuple[Reach, ...] = ()
    what: str = ""


class Unsupported(Exception):
    """The library has no such thing; the text says what."""


class Case:
    """One measurement. `build`, `outputs` and `sample` run in the worker of each library, in this order.

    Outputs are compared by the relative error ‖a − b‖/‖b‖ of each tensor. With `draws` they are random (dropout): then
    the means over that many draws are compared, in units of their standard error, and so are the variances.
    """

    name: str = ""
    figures: ClassVar[dict[str, Figure]] = {}
    tolerance: float = 1e-4
    draws: int = 0
    rounds: int | None = None  # fewer than asked for, where a figure is a count
    only_ours: bool = False
    quick: bool = False  # a smoke run: sizes may shrink

    def fixture(self, folder: Path) -> None:
        """Write what both libraries read into this folder. Runs once, in upstream's worker where there is one."""

    def build(self, folder: Path) -> None:
        raise NotImplementedError

    def outputs(self) -> dict[str, Tensor]:
        """What must be the same in both libraries."""
        raise NotImplementedError

    def sample(self) -> dict[str, float]:
        """One round: the figures by name."""
        raise NotImplementedError
