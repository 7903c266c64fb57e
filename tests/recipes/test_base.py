"""What all tasks share: the prompt, the labels, the column to learn."""

from __future__ import annotations

import pytest

from peft.errors import UserError
from peft.recipes.job import Data
from peft.recipes.tasks.base import Task


class Kind(Task):
    type = "CAUSAL_LM"


def test_rows_go_into_the_template() -> None:
    row = {"body": "hello", "tone": "kind"}
    assert Kind(Data(text="body"), None).prompt(row) == "hello"
    assert Kind(Data(text="body", template="{text} ({tone})"), None).prompt(row) == "hello (kind)"
    with pytest.raises(UserError, match="Did you mean tone"):
        Kind(Data(text="body", template="{tones}"), None).prompt(row)


def test_labels_have_their_index_and_others_are_named() -> None:
    task = Kind(Data(), None, ["no", "yes", "3"])
    assert [task.label_index(v) for v in ("yes", 3)] == [1, 2]
    with pytest.raises(UserError, match="'maybe'.*no, yes, 3"):
        task.label_index("maybe")


def test_a_task_that_learns_a_column_asks_for_it() -> None:
    assert Kind(Data(target="mood"), None).target == "mood"
    with pytest.raises(UserError, match="data.target is null"):
        _ = Kind(Data(target=None), None).target
