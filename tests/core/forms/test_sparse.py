"""Positions of sparse selections: different ones below n, and the largest share of several tensors together."""

from __future__ import annotations

import pytest
import torch

from peft.core.forms.sparse import distinct, top_entries


@pytest.mark.parametrize(("n", "count"), [(10, 10), (10, 5), (1000, 3), (100_000, 200)])
def test_positions_are_different_in_order_and_the_seeds_own(n, count):
    found = distinct(n, count, torch.Generator().manual_seed(1))
    assert len(found) == count and (found.diff() > 0).all() and found[0] >= 0 and found[-1] < n
    assert torch.equal(found, distinct(n, count, torch.Generator().manual_seed(1)))
    assert count == n or not torch.equal(found, distinct(n, count, torch.Generator().manual_seed(2)))


def test_the_share_is_taken_of_all_entries_together():
    scores = {"a": torch.tensor([[9.0, 1.0], [8.0, 2.0]]), "b": torch.tensor([3.0, 7.0, 0.0, 0.5])}
    assert {k: v.tolist() for k, v in top_entries(scores, 3 / 8).items()} == {"a": [0, 2], "b": [1]}


def test_each_tensor_keeps_its_largest_entry():
    scores = {"a": torch.tensor([9.0, 8.0]), "b": torch.tensor([0.1, 0.3])}
    assert {k: v.tolist() for k, v in top_entries(scores, 0.5).items()} == {"a": [0, 1], "b": [1]}


def test_ties_are_broken_so_that_exactly_the_share_is_taken():
    found = top_entries({"a": torch.ones(8)}, 0.25)
    assert len(found["a"]) == 2
