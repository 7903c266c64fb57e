"""Which tokens are the first and the last of their sequences."""

from __future__ import annotations

import pytest
import torch

from peft.core.acting.span import Span

CPU = torch.device("cpu")


def ends(span, p, s, of_prompt=False):
    first, last = span.ends(p, s, CPU, of_prompt=of_prompt, method="M")
    return [["".join("x" if at else "." for at in row) for row in mask.tolist()] for mask in (first, last)]


def test_padding_on_either_side_does_not_count():
    number = torch.tensor([[-1, -1, 0, 1, 2], [0, 1, 2, -1, -1]])
    assert ends(Span(2, 5, number=number), 1, 2) == [["..x..", "x...."], ["...xx", ".xx.."]]


def test_a_short_sequence_is_first_and_last_at_once():
    assert ends(Span(1, 2), 3, 3) == [["xx"], ["xx"]]


def test_a_decoding_step_goes_on_counting_and_has_no_end():
    assert ends(Span(1, 1, offset=2), 3, 3) == [["x"], ["."]]
    assert ends(Span(1, 1, offset=3), 3, 3) == [["."], ["."]]


def test_a_continued_sequence_is_refused_where_its_end_matters():
    assert ends(Span(1, 3, offset=1), 2, 0) == [["x.."], ["..."]]
    with pytest.raises(
        ValueError, match="M with suffix_positions=1: this call continues a cached sequence with 3 tokens"
    ):
        ends(Span(1, 3, offset=1), 2, 1)


def test_a_prompt_is_the_sequence_where_it_is_asked_for_and_a_row_has_one():
    prompt = torch.tensor([[True, True, False, False], [False, False, False, False]])
    span = Span(2, 4, prompt=prompt)
    assert ends(span, 1, 1, of_prompt=True) == [["x...", "x..."], [".x..", "...x"]]
    assert ends(span, 1, 1) == [["x...", "x..."], ["...x", "...x"]]


def test_tensors_that_are_not_the_known_tokens_hold_whole_sequences():
    known = Span(2, 3, offset=5)
    assert Span.of(torch.zeros(2, 3, 8), known) is known and Span.of(torch.zeros(6, 8), known) is known
    assert Span.of(torch.zeros(4, 5, 6, 8), known) == Span(4, 30)
    assert Span.of(torch.zeros(4, 8), None) == Span(4, 1)
