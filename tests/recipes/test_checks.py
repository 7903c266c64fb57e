"""Settings have types and ranges; templates hold columns and nothing else; synonyms are explained."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from peft.errors import UserError
from peft.recipes import checks
from peft.recipes.job import Data, Job, check_job, columns_of, made, parse

NAN = float("nan")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_length", v) for v in (-1, 0, 1, 2.5, "12", True, None, NAN, 1 << 40)),
        *(("limit", v) for v in (0, -3, "2", 1.5, True)),
        *(("choices", v) for v in ("abc", [], ["a"], ["a", "a"], ["a", None], ["a", True], ["a", " "], {"a": 1}, 3)),
        *(("text", v) for v in (None, "", 3, ["text"])),
        *(("target", v) for v in ("", 3, ["a"])),
        *(("train", v) for v in (3, ["a"])),
        *(("eval", v) for v in (0, 1, 1.5, -0.1, True, NAN, ["a"])),
        *(("template", v) for v in (3, "no column", "{", "}", "{}", "{0.a", "{text!r}", "{text:>9}", "{text[0}")),
        ("skip_bad_rows", "yes"),
    ],
)
def test_a_data_field_out_of_its_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"data.{field}"):
        made({"model": "m", "data": dataclasses.asdict(Data(train="a.jsonl")) | {field: value}})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("seed", v) for v in (-1, 1.5, "0", True, None, 1 << 40)),
        *(("checkpoint_minutes", v) for v in (0, -1, NAN, float("inf"), "3", True)),
        *(("show", v) for v in (-1, "2")),
        *(("evaluate_before", v) for v in ("false", 0, None)),
        *((n, v) for n in ("model", "method", "output", "dtype") for v in (3, None, ["a"], "a\0b")),
        ("task", 3),
    ],
)
def test_a_job_field_out_of_its_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{field}"):
        made({"model": "m", "data": {}} | {field: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("learning_rate", v) for v in (NAN, float("inf"), 0, -1e-3, "1e-3", True)),
        *(("max_steps", v) for v in (0, -2, 1.5, "10", True)),
        *(("num_train_epochs", v) for v in (0, -1, NAN)),
        *(("per_device_train_batch_size", v) for v in (0, -1, 1.5, "8")),
        ("gradient_accumulation_steps", 0),
        ("warmup_steps", -1),
        ("adam_beta1", 1.5),
        ("optim_target", NAN),
    ],
)
def test_a_training_argument_out_of_its_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"trainer\.{name} is"):
        checks.check_trainer({name: value})


def test_what_is_right_passes() -> None:
    checks.check_trainer({"max_steps": -1, "learning_rate": 1e-3, "warmup_steps": 0.05, "num_train_epochs": 0.5})
    check_job(Job(model="m", data=Data(eval=0.1, choices=["a", "b"], template="{{x}} {a.b} {text}", target=None)))


def test_a_template_reaches_columns_and_nothing_else() -> None:
    data = Data(template="{text.__class__} {text} {b}", text="body")
    assert columns_of(data) == ["text.__class__", "body", "b"]
    assert checks.pieces("{{a}} {b}") == [("{", None), ("a}", None), (" ", "b")]
    for bad in ("{text:>999999999}", "{text!r:{b}}", "{ }"):
        with pytest.raises(UserError, match="not the name of a column"):
            checks.pieces(bad)
    with pytest.raises(UserError, match="200000 characters"):
        checks.pieces("a" * 200_000)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("lr: 1", "`trainer.learning_rate`"),
        ("epochs: 1", "`trainer.num_train_epochs`"),
        ("batch_size: 1", "`trainer.per_device_train_batch_size`"),
        ("rank: 1", "`config.r`"),
        ("dataset: x", "`data.train`"),
        ("data: {max_seq_length: 1}", "`data.max_length`"),
        ("modle: x", "Did you mean model"),
    ],
)
def test_usual_synonyms_are_explained(given: str, said: str) -> None:
    raw = parse(given, "job")
    assert isinstance(raw, dict)
    with pytest.raises(UserError, match="Unknown key") as error:
        made({"data": {}} | raw)
    assert said in str(error.value)
    assert checks.synonym("--lr", flag=True) == "Here it is --trainer learning_rate=...."


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "more than 20000 values"),
        ("a: &a [*a]", "inside what it repeats"),
        ("a: 1\na: 2", "'a' stands there twice"),
        ("{a: {b: 1, b: 2}}", "'b' stands there twice"),
        ("a: !!python/object/apply:os.system [x]", "python"),
        ("a: !!python/name:os.system", "python"),
        ("[" * 5000, "nested deeper"),
        ("a" * 300_000, "300000 characters"),
        ("a: 2001-99-99", "month"),
        ("{[a]: 1}", "unhashable"),
        ("a: \x01", "special characters"),
        ("a: " + "1" * 5000, "digits"),
        ("a: *b", "undefined alias"),
    ],
)
def test_yaml_is_bounded_and_unambiguous(text: str, said: str) -> None:
    with pytest.raises(UserError, match=r"job\.yaml") as error:
        parse(text, "job.yaml")
    assert said in str(error.value)


def test_aliases_may_repeat_what_is_small() -> None:
    assert parse("a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}, d: 2}", "x") == {"a": [1, 2], "b": [1, 2], "c": {"d": 2}}
