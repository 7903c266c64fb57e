"""What a call's arguments say of its tokens, and that a watched model keeps it for as long as it runs."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from peft.core.acting.roster import Roster
from peft.core.acting.span import Span
from peft.core.acting.watch import read, unwatch, watch

IDS = torch.zeros(2, 3, dtype=torch.long)


def test_a_mask_numbers_the_real_tokens_of_each_row():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    span = read({"input_ids": IDS, "attention_mask": mask}, None)
    assert (span.rows, span.length, span.offset) == (2, 3, 0)
    assert span.number.tolist() == [[-1, 0, 1], [0, 1, 2]]


def test_what_a_cache_holds_comes_first():
    cache = SimpleNamespace(get_seq_length=lambda: 2)
    whole = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    asked = {"input_ids": IDS, "past_key_values": cache}
    assert read(asked, None).numbers(torch.device("cpu")).tolist() == [[2, 3, 4]] * 2
    assert read({**asked, "attention_mask": whole}, None).number.tolist() == [[1, 2, 3], [2, 3, 4]]
    assert read({**asked, "attention_mask": whole[:, 2:]}, None).number.tolist() == [[2, 3, 4]] * 2


def test_the_prompt_is_what_lies_before_the_first_label():
    labels = torch.tensor([[-100, -100, 7], [-100, 5, -100]])
    outer = read({"input_ids": IDS, "labels": labels}, None)
    assert outer.prompt.tolist() == [[True, True, False], [True, False, False]]
    assert read({"inputs_embeds": torch.zeros(2, 3, 4)}, outer).prompt is outer.prompt


def test_a_call_without_tokens_fits_nothing():
    assert read({"pixel_values": torch.zeros(2, 3)}, None) == Span(0, 0)


class Net(nn.Module):
    def __init__(self, roster: Roster) -> None:
        super().__init__()
        self.__dict__["roster"] = roster

    def forward(self, input_ids, attention_mask=None):
        return self.roster.span


def test_a_watched_model_has_the_span_during_its_call_alone():
    roster = Roster()
    net = Net(roster)
    assert net(IDS) is None
    watch(net, roster)
    watch(net, roster)
    assert net(IDS) == Span(2, 3) and net(IDS).outer is None and roster.span is None
    unwatch(net)
    assert net(IDS) is None and not net._forward_hooks and not net._forward_pre_hooks
