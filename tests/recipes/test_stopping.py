"""Memory, and stopping between two steps."""

from __future__ import annotations

import signal
from types import SimpleNamespace

from peft.recipes.events import Event, StopAsked
from peft.recipes.stopping import Stopper, memory


def test_memory_and_stop_on_a_signal() -> None:
    assert memory()["peak"] >= memory()["now"] > 0
    control, state = (
        SimpleNamespace(should_save=False, should_training_stop=False),
        SimpleNamespace(global_step=3, max_steps=9),
    )
    with Stopper() as stopper:
        stopper.on_step_end(None, state, control)
        assert not control.should_save
        signal.raise_signal(signal.SIGINT)
        stopper.on_step_end(None, state, control)
    assert control.should_save and control.should_training_stop and stopper.asked


def test_a_signal_is_told_and_a_second_one_is_the_callers() -> None:
    told: list[Event] = []
    before = signal.getsignal(signal.SIGTERM)
    with Stopper(on_event=told.append):
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == before
    assert told == [StopAsked()] and signal.getsignal(signal.SIGTERM) == before


def test_it_stops_after_a_number_of_steps_but_not_at_the_last() -> None:
    stopper = Stopper(2)
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    stopper.on_train_begin(None, SimpleNamespace(global_step=5), control)
    for step, stopped in ((6, False), (7, True)):
        stopper.on_step_end(None, SimpleNamespace(global_step=step, max_steps=9), control)
        assert stopper.stopped == control.should_training_stop == control.should_save == stopped
    last = Stopper(2)
    last.on_step_end(None, SimpleNamespace(global_step=9, max_steps=9), control)
    assert not last.stopped
