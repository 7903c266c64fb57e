"""Calls side by side, changes alone."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest

from peft.core.acting import gate as module
from peft.core.acting.gate import Gate


def started(run) -> threading.Thread:
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def ended(thread: threading.Thread) -> None:
    thread.join(20)
    assert not thread.is_alive()


def waiting(gate: Gate) -> None:
    """Until a change waits."""
    while not gate._waiting:
        threading.Event().wait(0.001)


def test_a_change_waits_for_the_calls_of_other_threads():
    gate, order = Gate(), []

    def change() -> None:
        with gate.change():
            order.append("changed")

    with gate.call():
        thread = started(change)
        waiting(gate)
        order.append("called")
    ended(thread)
    assert order == ["called", "changed"]


def test_calls_run_side_by_side():
    gate, met = Gate(), threading.Barrier(2)

    def call() -> None:
        with gate.call():
            met.wait(20)

    thread = started(call)
    call()
    ended(thread)


def test_a_change_within_a_call_and_a_call_within_a_change_pass():
    gate = Gate()
    with gate.call(), gate.change(), gate.call(), gate.change():
        assert gate.called
    assert not gate.called and not gate._depth and gate._changing is None


def test_a_waiting_change_goes_before_new_calls_but_lets_them_pass_after_a_while(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    gate, order = Gate(), []

    def change() -> None:
        with gate.change():
            order.append("changed")

    def call() -> None:  # one that the running call waits for: it may not wait for the change for ever
        with gate.call():
            order.append("called")

    with gate.call():
        changer = started(change)
        waiting(gate)
        ended(started(call))
    ended(changer)
    assert order == ["called", "changed"]


def test_two_calls_that_wait_for_each_other_are_told_so():
    gate, met, found = Gate(), threading.Barrier(2), []

    def both() -> None:
        with gate.call():
            met.wait(20)
            try:
                with gate.change():
                    found.append("changed")
            except RuntimeError as e:
                found.append(str(e))

    thread = started(both)
    both()
    ended(thread)
    assert "changed" in found and any("side by side" in f for f in found)


def test_an_error_leaves_nothing_behind():
    gate = Gate()
    for within in (gate.call, gate.change):
        with pytest.raises(KeyboardInterrupt), within():
            raise KeyboardInterrupt
    assert not gate._inside and gate._changing is None and not gate._waiting


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))])
def test_a_copy_is_called_by_nobody(twin):
    gate = Gate()
    with gate.call():
        assert not twin(gate).called
