"""What hooks know of a running call is their thread's alone, and prompts that are switched off put nothing anywhere."""

from __future__ import annotations

import copy
import threading

from peft.core.acting.roster import Roster
from peft.core.prompts.state import InCall, PromptState
from tests.golden.prompt import make


def test_each_thread_has_a_call_of_its_own():
    state, seen = PromptState(make.build("llama_gqa"), Roster()), []
    state.call.entered = True
    thread = threading.Thread(target=lambda: seen.append(state.call))
    thread.start()
    thread.join()
    (other,) = seen
    assert isinstance(other, InCall) and other is not state.call and not other.entered
    assert state.call.entered and not copy.deepcopy(state).call.entered


def test_prompts_that_are_switched_off_put_nothing_before_the_tokens():
    roster = Roster()
    state = PromptState(make.build("llama_gqa"), roster)
    assert state.front(2) is None
    state.off = roster.off_by_layer
    assert state.front(2) is None
    roster.enable(True)
    assert state.off is not roster.off_by_layer
