"""Overlays: who acts in a call, for the thread or task that opened them, closed in any order; and in graphs."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import pickle
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from peft.core.acting.calls import OPEN, Calls
from peft.core.acting.mix import Mix

A, B, C = (Mix((n,)) for n in "abc")


def calls() -> Calls:
    made = Calls()
    made.mix = A
    return made


def in_thread(run):
    out = []
    thread = threading.Thread(target=lambda: out.append(run()))
    thread.start()
    thread.join()
    return out[0]


def test_an_overlay_is_its_threads_alone():
    made = calls()
    with made.using(B, enabled=False):
        assert made.mix is B and not made.enabled
        assert in_thread(lambda: (made.mix, made.enabled)) == (A, True)
        assert in_thread(lambda: made.own) is A
    assert made.mix is A and made.enabled and OPEN.get() == ()


def test_overlays_may_be_closed_in_any_order():
    made = calls()
    first, second = made.open(B), made.open(C)
    assert made.mix is C
    made.close(first)
    assert made.mix is C
    made.close(second)
    assert made.mix is A and OPEN.get() == () and made.here.overlay is None


def test_one_that_another_thread_closes_is_closed_for_all():
    made = calls()
    overlay = made.open(B)
    in_thread(lambda: made.close(overlay))
    assert made.mix is A
    with made.using(C):
        assert made.mix is C
    assert OPEN.get() == () and made.here.overlay is None


def test_models_do_not_share_overlays():
    made, other = calls(), calls()
    with made.using(B), other.using(C):
        assert made.mix is B and other.mix is C
        with made.using(C):
            assert made.mix is C
        assert made.mix is B


def test_a_switch_within_an_overlay_is_the_models_and_shows_when_it_closes():
    made = calls()
    with made.using(B):
        made.mix = C
        assert made.mix is B and in_thread(lambda: made.mix) is C
    assert made.mix is C


def test_tasks_of_one_thread_have_each_their_own():
    made = calls()

    async def within(mix: Mix, first: float, second: float) -> list[Mix]:
        seen = []
        await asyncio.sleep(first)
        with made.using(mix, held=True):
            seen.append(made.mix)
            await asyncio.sleep(second)
            seen += [made.mix, await asyncio.to_thread(lambda: made.mix)]
        return [*seen, made.mix]

    async def both() -> list[list[Mix]]:
        return await asyncio.gather(within(B, 0, 0.02), within(C, 0.01, 0.02))

    assert asyncio.run(both()) == [[B, B, B, A], [C, C, C, A]]
    assert made.mix is A and not made.abroad


def test_a_copied_context_has_it_until_it_is_closed():
    made = calls()
    with made.using(B):
        copied = contextvars.copy_context()
        assert in_thread(lambda: copied.run(lambda: made.mix)) is B
    assert copied.run(lambda: made.mix) is A


def test_a_call_goes_on_with_the_mix_that_it_began_with():
    made = calls()
    with made.steady():
        made.mix = B
        assert made.mix is A
    assert made.mix is B
    held = made.open(C, held=True)
    with made.steady():
        made.close(held)
        assert made.mix is C
    assert made.mix is B


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_has_the_models_own_mix(twin):
    made = calls()
    with made.using(B, enabled=False, held=True):
        other = twin(made)
        assert other.mix == A and other.enabled and not other.abroad


def test_a_graph_reads_the_overlay_of_its_thread_and_is_not_compiled_again():
    made = calls()
    torch._dynamo.reset()
    frames = CompileCounter()

    def run(x: torch.Tensor) -> torch.Tensor:
        return x * (2 if made.mix.active == ("a",) else 3)

    compiled, x = torch.compile(run, fullgraph=True, backend=frames), torch.ones(1)
    assert compiled(x).item() == 2
    for _ in range(3):
        with made.using(B, held=True):
            assert compiled(x).item() == 3
            assert in_thread(lambda: compiled(x).item()) == 2
        assert compiled(x).item() == 2
    assert frames.frame_count == 2


def test_a_graph_may_open_one():
    made = calls()
    torch._dynamo.reset()

    def run(x: torch.Tensor) -> torch.Tensor:
        with made.using(B):
            y = x * (2 if made.mix.active == ("a",) else 3)
        return y + (10 if made.mix.active == ("a",) else 20)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert compiled(torch.ones(1)).item() == 13 and compiled(torch.ones(1)).item() == 13
    assert made.mix is A


def test_tasks_that_graphs_cannot_tell_apart_break_them():
    made = calls()
    torch._dynamo.reset()

    def run(x: torch.Tensor) -> torch.Tensor:
        return x * (2 if made.mix.active == ("a",) else 3)

    compiled = torch.compile(run, backend="eager")

    async def within() -> float:
        with made.using(B, held=True):
            await asyncio.sleep(0.02)
            return compiled(torch.ones(1)).item()

    async def beside() -> float:
        await asyncio.sleep(0.01)
        return compiled(torch.ones(1)).item()

    async def both() -> list[float]:
        return await asyncio.gather(within(), beside())

    assert asyncio.run(both()) == [3.0, 2.0]
