"""One adapter per row: which positions of a layer's input belong to whom."""

from __future__ import annotations

import pytest
import torch

from peft.core.acting.rows import Rows

CPU = torch.device("cpu")


def test_positions_are_grouped_by_name_and_the_permutation_undoes_it():
    groups, undo = Rows(["a", "b", "a"]).groups(3, "layer", CPU)
    assert [(n, i.tolist()) for n, i in groups] == [("a", [0, 2]), ("b", [1])]
    x = torch.tensor([10, 20, 30])
    assert torch.equal(torch.cat([x[i] for _, i in groups])[undo], x)


def test_flattened_tokens_belong_to_their_row():
    assert Rows(["a", "b"], tokens=3).row_of(6, "layer", CPU).tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("tokens", "n"), [(None, 4), (2, 9)])
def test_rows_that_cannot_be_told_apart_are_an_error(tokens, n):
    with pytest.raises(ValueError, match=rf"adapter_names has 3 entries, but the\.layer sees {n} rows"):
        Rows(["a", "b", "a"], tokens).row_of(n, "the.layer", CPU)


def test_places_are_slices_where_rows_lie_together():
    places = Rows(["a", "b", "b", "a"]).places(torch.zeros(4, 2, 5), "layer")
    (a, where_a), (b, where_b) = places
    assert (a, b) == ("a", "b") and where_a.tolist() == [0, 1, 6, 7] and where_b == slice(2, 6)


def test_a_layer_may_say_which_row_each_input_is_of():
    rows = Rows(["a", "b"])
    places = rows.places_of(torch.tensor([1, 1, 0]), torch.zeros(3, 5))
    assert places == [("a", slice(2, 3)), ("b", slice(0, 2))]
    with torch.no_grad():
        assert [n for n, _ in rows.of(torch.tensor([1, 1]))[0]] == ["b"], "a name without rows has no group"
    # … but where gradients are wanted: its adapter gets zeros, not None, on every rank alike
    assert [(n, len(i)) for n, i in rows.of(torch.tensor([1, 1]))[0]] == [("a", 0), ("b", 2)]
    assert rows.places_of(torch.tensor([1, 1]), torch.zeros(2, 5)) == [("a", slice(0, 0)), ("b", slice(0, 2))]
