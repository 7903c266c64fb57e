"""What stands before the tokens of one call: widths per row, padding turned round, masks and caches that make room."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peft import Refusal
from peft.core.prompts.arguments import batch, before, flat_mask, refuse_gap, refuse_packed, seen, spread, taken
from peft.core.prompts.front import Front

CPU = torch.device("cpu")


def method(inputs: int = 0, keyed: int = 0):
    return SimpleNamespace(inputs=inputs, keyed=keyed)


def front(*groups, row=None) -> Front:
    return Front(len(row) if row else 2, [list(g) for g in groups], torch.tensor(row) if row else None)


def test_the_width_is_that_of_the_widest_group():
    mixed = front([method(2), method(1)], [method(keyed=4)], [], row=[0, 1, 2, 0])
    assert (mixed.soft, mixed.keyed, mixed.S, mixed.P, mixed.width) == ([3, 0, 0], [0, 4, 0], 3, 4, 7)
    assert mixed.uneven and not front([method(2)]).uneven
    assert mixed.per_row(mixed.soft, CPU).tolist() == [3, 0, 0, 3]


def test_the_padding_of_shorter_rows_lies_on_the_left():
    mixed = front([method(3)], [method(1)], row=[1, 0])
    assert mixed.visible(mixed.soft, mixed.S, CPU).tolist() == [[0, 0, 1], [1, 1, 1]]


def test_behind_the_text_lies_the_padding_of_shorter_fronts_in_encoders():
    mixed = front([method(2)], [method(0)], row=[1, 0])
    t, mask = torch.tensor([[0, 0, 7, 8], [5, 6, 7, 8]]), torch.ones(2, 2).long()
    assert taken(t, mixed.order(mask, 4, trailing=True)).tolist() == [[7, 8, 0, 0], [5, 6, 7, 8]]
    even = front([method(2)])
    assert even.order(mask, 4, trailing=True) is None


def test_padding_on_the_left_stands_before_the_virtual_tokens():
    both = front([method(2)])
    columns = torch.tensor([[50, 51, 1, 2, 3]] * 3)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 0]])
    moved = taken(columns, both.order(mask, 5, trailing=False))
    assert moved.tolist() == [[1, 50, 51, 2, 3], [50, 51, 1, 2, 3], [50, 51, 1, 2, 3]]
    assert both.order(None, 5, trailing=False) is None


def test_each_row_takes_its_own_groups_part():
    parts = [torch.tensor([[1], [2]]), torch.tensor([[3], [4]])]
    assert front([], [], row=[1, 0]).choose(parts).tolist() == [[3], [2]] and front([]).choose(parts) is parts[0]


def test_columns_before_batches_and_caches():
    assert before(torch.tensor([[1, 2]]), 2, 9).tolist() == [[9, 9, 1, 2]]
    assert before(torch.ones(1, 1, 3), 1, 0).shape == (1, 2, 3)
    assert batch({"labels": torch.zeros(3, 1), "other": torch.zeros(5)}) == 3 and batch({}) == 1
    assert seen(None) == 0 and seen(SimpleNamespace(get_seq_length=lambda: 4)) == 4


def test_values_are_spread_over_beams_or_gathered_from_them():
    assert spread(["a", "b"], 4, "names") == ["a", "a", "b", "b"]
    assert spread(["a", "a", "b", "b"], 2, "names") == ["a", "b"]
    with pytest.raises(ValueError, match="names has 2 entries for 3 rows"):
        spread(["a", "b"], 3, "names")


def test_full_causal_masks_become_flat_and_other_shapes_are_refused():
    flat = torch.tensor([[0, 1, 1]])
    causal = torch.ones(3, 3, dtype=torch.bool).tril()
    full = (causal & flat.bool()[:, None])[:, None]
    assert flat_mask(flat, 3) is flat and flat_mask(None, 3) is None
    assert flat_mask(full, 3).tolist() == flat.tolist()
    assert flat_mask({"full_attention": torch.where(full, 0.0, -1e9)}, 3).tolist() == flat.tolist()
    blocks = torch.block_diag(torch.ones(1, 1), torch.ones(2, 2)).bool()[None, None]
    with pytest.raises(ValueError, match="virtual tokens have no place"):
        flat_mask(blocks, 3)


def test_packed_texts_are_refused():
    refuse_packed(torch.tensor([[0, 1, 2]]), None, 0)
    refuse_packed(torch.tensor([[0, 1, 0]]), torch.ones(1, 3), 0)
    with pytest.raises(ValueError, match="position_ids start again"):
        refuse_packed(torch.tensor([[0, 1, 0]]), None, 0)


def test_a_window_refuses_room_between_a_prefix_and_its_text():
    mixed, sliding = front([method(2)], [method(keyed=3)], row=[0, 1]), SimpleNamespace(is_sliding=[False, True])
    with pytest.raises(Refusal, match="has a window"):
        refuse_gap(nn.Linear(2, 2), sliding, mixed)
    refuse_gap(nn.Linear(2, 2), SimpleNamespace(is_sliding=[False]), mixed)
    refuse_gap(nn.Linear(2, 2), sliding, front([method(keyed=3)]))
