"""Labels of texts and of words."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from peft.errors import UserError
from peft.recipes.bases import load_tokenizer, resolve
from peft.recipes.job import Data
from peft.recipes.tasks.classification import SequenceClassification, TokenClassification


def test_labels_come_from_the_job_the_data_set_or_the_rows() -> None:
    rows = datasets.Dataset.from_list([{"text": "a", "label": v} for v in ("no", "yes", "no")])
    assert SequenceClassification.find_labels(Data(), rows) == ["no", "yes"]
    assert SequenceClassification.find_labels(Data(choices=["yes", "no"]), rows) == ["yes", "no"]
    declared = rows.cast_column("label", datasets.ClassLabel(names=["yes", "no"]))
    assert SequenceClassification.find_labels(Data(), declared) == ["yes", "no"]
    for kind in (SequenceClassification, TokenClassification):
        with pytest.raises(UserError, match=f"data.target is null, but {kind.type}"):
            kind.find_labels(Data(target=None), rows)


def test_the_first_token_of_a_word_carries_its_label(home: Path) -> None:
    tokenizer = load_tokenizer(resolve(str(home / "bert")))
    task = TokenClassification(Data(text="words", target="tags"), tokenizer, ["mood", "other"])
    found = task.encode({"words": ["the", "box", "broken"], "tags": ["other", 1, 0]})
    assert [label for label in found["labels"] if label != -100] == [1, 1, 0]
    assert len(found["labels"]) == len(found["input_ids"])
    with pytest.raises(UserError, match="2 words but 1 labels"):
        task.encode({"words": ["the", "box"], "tags": ["other"]})
    assert task.model_arguments()["id2label"] == {0: "mood", 1: "other"}
