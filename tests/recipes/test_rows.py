"""Rows that cannot be right are named with file and line, or left out and counted; none is trained on."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from peft.errors import UserError
from peft.recipes import data, events
from peft.recipes.bases import load_tokenizer, resolve
from peft.recipes.job import Data
from peft.recipes.tasks.base import Task
from peft.recipes.tasks.classification import SequenceClassification, TokenClassification
from peft.recipes.tasks.text import CausalLM

GOOD: list[dict[str, Any]] = [{"text": "fine", "label": "a"}, {"text": "bad", "label": "b"}] * 2


def write(file: Path, rows: list[Any]) -> str:
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(file)


BAD: dict[str, tuple[Any, str]] = {
    "null text": ({"text": None, "label": "a"}, "'text' is missing or null"),
    "no text": ({"label": "a"}, "'text' is missing or null"),
    "number": ({"text": 5, "label": "a"}, "expected text"),
    "list": ({"text": ["x"], "label": "a"}, "expected text"),
    "true": ({"text": True, "label": "a"}, "expected text"),
    "empty": ({"text": "", "label": "a"}, "'text' is empty"),
    "blank": ({"text": " \n", "label": "a"}, "'text' is empty"),
    "null label": ({"text": "x", "label": None}, "'label' is missing or null"),
    "no label": ({"text": "x"}, "'label' is missing or null"),
    "empty label": ({"text": "x", "label": ""}, "'label' is empty"),
    "unknown label": ({"text": "x", "label": "c"}, "none of: a, b"),
    "NaN label": ('{"text": "x", "label": NaN}', "'label' is nan"),
    "infinite label": ('{"text": "x", "label": 1e999}', "'label' is inf"),
    "label list": ({"text": "x", "label": ["a"]}, "expected text"),
    "no JSON": ("{", "not JSON"),
    "no row": ("3", "expected a row"),
    "twice": ('{"text": "x", "text": "y", "label": "a"}', "twice"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", [CausalLM, SequenceClassification])
def test_a_row_that_cannot_be_right_is_named_or_left_out(tmp_path: Path, bad: str, kind: type[Task]) -> None:
    row, said = BAD[bad]
    file = write(tmp_path / "rows.jsonl", [*GOOD[:2], row, *GOOD[2:]])
    with pytest.raises(UserError) as error:
        data.load(Data(train=file, choices=["a", "b"]), 0, kind)
    assert f"{file}, line 3: " in str(error.value) and said in str(error.value)
    told: list[events.Event] = []
    train, _ = data.load(Data(train=file, choices=["a", "b"], skip_bad_rows=True), 0, kind, told.append)
    assert list(train["text"]) == ["fine", "bad"] * 2 and "None" not in list(train["text"])
    (skipped,) = told
    assert isinstance(skipped, events.Skipped) and (skipped.count, skipped.rows) == (1, 5)
    assert skipped.first[0][0] == "line 3" and said in skipped.first[0][1]


def test_a_file_of_bad_rows_only_is_refused_all_the_same(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"text": None, "label": "a"}] * 3)
    with pytest.raises(UserError, match="None of the 3 rows"):
        data.load(Data(train=file, skip_bad_rows=True), 0, CausalLM)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"words": ["a", "b"], "tags": ["x"]}, "2 words but 1 labels"),
        ({"words": ["a", None], "tags": ["x", "x"]}, "null"),
        ({"words": [], "tags": []}, "no words"),
        ({"words": None, "tags": []}, "null"),
        ({"words": ["a"], "tags": [None]}, "null"),
        ({"words": ["a"], "tags": ["z"]}, "none of: x, y"),
        ({"words": ["a"], "tags": "x"}, "a list of labels"),
        ({"words": ["a"]}, "a list of labels"),
        ({"words": [""], "tags": ["x"]}, "empty"),
    ],
)
def test_words_and_their_labels(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    good = {"words": ["p", "q"], "tags": ["x", "y"]}
    file = write(tmp_path / "rows.jsonl", [good, row])
    job = Data(train=file, text="words", target="tags", choices=["x", "y"])
    with pytest.raises(UserError, match=r"line 2: ") as error:
        data.load(job, 0, TokenClassification)
    assert said in str(error.value)


def test_held_out_rows_are_checked_against_the_labels_of_the_training_rows(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", GOOD)
    held = write(tmp_path / "held.jsonl", [*GOOD, {"text": "x", "label": "c"}])
    with pytest.raises(UserError, match=r"held\.jsonl, line 5: .*none of: a, b"):
        data.load(Data(train=train, eval=held), 0, SequenceClassification)


def test_answers_that_no_row_has_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", GOOD)
    for kind in (CausalLM, SequenceClassification):
        with pytest.raises(UserError, match="no row has 'c' in column 'label', which has: a, b"):
            data.load(Data(train=file, choices=["a", "b", "c"]), 0, kind)


def test_a_named_text_column_that_is_not_there_is_refused_with_a_template_too(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", GOOD)
    for template in (None, "{text}:", "{label}:"):
        with pytest.raises(UserError, match="data.text is 'txt'.*Did you mean text"):
            data.load(Data(train=file, text="txt", template=template), 0, CausalLM)
    with pytest.raises(UserError, match="data.template names the column 'lable'"):
        data.load(Data(train=file, template="{lable}"), 0, CausalLM)


def test_other_columns_of_a_template_may_be_numbers_or_empty_but_not_missing(tmp_path: Path) -> None:
    rows = [{"q": "one", "n": 1, "label": "a"}, {"q": "", "n": 2.5, "label": "b"}]
    job = Data(train=write(tmp_path / "rows.jsonl", rows), template="{q} {n}")
    assert len(data.load(job, 0, CausalLM)[0]) == 2
    write(tmp_path / "rows.jsonl", [*rows, {"q": None, "n": 1, "label": "a"}])
    with pytest.raises(UserError, match="line 3: column 'q' is missing or null"):
        data.load(job, 0, CausalLM)


def test_tables_keep_their_words_and_labels_that_are_numbers_stand_for_the_choices(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text;label\nNA;0\n007;1\nnull;0\n")
    train, _ = data.load(Data(train=str(file)), 0, CausalLM)
    assert list(train["text"]) == ["NA", "007", "null"] and list(train["label"]) == [0, 1, 0]
    assert len(data.load(Data(train=str(file), choices=["no", "yes"]), 0, SequenceClassification)[0]) == 3
    file.write_text("text,label\na,b\nc\nd,e,f\n")
    with pytest.raises(UserError, match=r"line 3: 1 columns.*line 4: 3 columns"):
        data.load(Data(train=str(file)), 0, CausalLM)


def test_columns_whose_values_do_not_go_together_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [GOOD[0] | {"id": 1}, GOOD[1] | {"id": "x"}])
    with pytest.raises(UserError, match="column 'id' holds values .*int in line 1 but str in line 2"):
        data.load(Data(train=file), 0, CausalLM)
    file = write(tmp_path / "rows.jsonl", [{"text": "x", "label": 1}, {"text": "y", "label": "one"}])
    assert list(data.load(Data(train=file), 0, CausalLM)[0]["label"]) == ["1", "one"]


def test_local_files_touch_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas

    asked: list[Any] = []

    def refuse(*given: Any, **_: Any) -> Any:
        asked.append(given)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    frame = pandas.DataFrame(GOOD)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_json(tmp_path / "a.json", orient="records")
    write(tmp_path / "a.jsonl", GOOD)
    for suffix in ("csv", "parquet", "json", "jsonl"):
        assert len(data.load(Data(train=str(tmp_path / f"a.{suffix}")), 0, CausalLM)[0]) == 4
    assert asked == []


def test_text_and_target_do_not_stick_together_and_both_are_bounded(home: Path) -> None:
    tokenizer = load_tokenizer(resolve(str(home / "llama")))
    task = CausalLM(Data(max_length=8), tokenizer)
    assert task.prompt({"text": "the box", "label": "complaint"}) == "the box\n"
    assert CausalLM(Data(target=None), tokenizer).prompt({"text": "the box"}) == "the box"
    found = task.encode({"text": "the box", "label": "complaint"})
    known = tokenizer.convert_ids_to_tokens(found["input_ids"])
    assert known == ["the", "box", "complaint", "</s>"] and found["labels"][:2] == [-100, -100]
    for text, label in (("the box " * 9, "complaint"), ("the", "complaint " * 20), ("the box " * 9, "no " * 20)):
        found = task.encode({"text": text, "label": label})
        assert len(found["input_ids"]) == len(found["labels"]) == 8 and found["labels"][0] == -100
