"""Rows with the lines they stand on, and files that are none of the kind they are taken for."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from peft.errors import UserError
from peft.recipes.files import rows_of, text_of


def lines(tmp_path: Path, name: str, content: str | bytes):
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return rows_of(file)


def test_each_row_knows_its_line(tmp_path: Path) -> None:
    found = lines(tmp_path, "a.jsonl", '\n{"a": 1}\r\n\n{"a": 2}')
    assert found.places == ["line 2", "line 4"] and found.rows == [{"a": 1}, {"a": 2}]
    found = lines(tmp_path, "a.json", '[\n {"a": 1},\n\n {"a":\n 2} ]\n')
    assert found.places == ["line 2", "line 4"] and found.rows == [{"a": 1}, {"a": 2}]
    assert lines(tmp_path, "b.json", '{"a": 1}\n{"a": 2}').places == ["line 1", "line 2"]
    assert lines(tmp_path, "c.json", "[]").rows == []
    found = lines(tmp_path, "a.csv", 'text,label\n"two\nlines",x\nlast,y\n')
    assert found.places == ["line 2", "line 4"] and found.rows[0] == {"text": "two\nlines", "label": "x"}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_guessed(tmp_path: Path, delimiter: str) -> None:
    text = f"text{delimiter}label\none, two; three{delimiter}a\n" if delimiter != "," else "text,label\none; two,a\n"
    text = text.replace("one, two; three", '"one, two; three"')
    for mark in ("", "\ufeff"):
        assert list(lines(tmp_path, "a.csv", mark + text).rows[0]) == ["text", "label"]


def test_a_csv_of_one_column_has_no_delimiter(tmp_path: Path) -> None:
    found = lines(tmp_path, "a.csv", "text\nfine\nalso fine\n")
    assert found.rows == [{"text": "fine"}, {"text": "also fine"}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\0\0\0", "is empty"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "gzip archive"),
        ("a.jsonl", '{"a": "b"}'.encode("utf-16"), "UTF-16"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}', "line 2: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\0"}', "line 2: a NUL byte"),
        ("a.json", '{"data": [1]}', None),
        ("a.json", '{\n"data": [1]}', "holds no list of rows"),
        ("a.json", '[{"a": 1}\n{"a": 2}]', "line 2: not JSON"),
        ("a.json", '[{"a": 1},', "line 1: not JSON"),
        ("a.json", '[{"a": 1},]', "line 1: not JSON"),
        ("a.json", '[{"a": 1}] x', "more after"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.csv", "a,a\n1,2\n", "names the column 'a' twice"),
        ("a.csv", "a,,b\n1,2,3\n", "without a name"),
        ("a.csv", 'a,b\n1,2\n"open,3\n', "line 3: not CSV"),
    ],
)
def test_files_that_cannot_be_read_are_told_as_what_they_are(
    tmp_path: Path, name: str, content: str | bytes, said: str | None
) -> None:
    if said is None:
        assert lines(tmp_path, name, content).rows
    else:
        with pytest.raises(UserError) as error:
            lines(tmp_path, name, content)
        assert said in str(error.value) and name in str(error.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1]", "a list, expected a row"),
        ("null", "a NoneType"),
        ('{"a": 1, "a": 2}', "'a' stands there twice"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"a": ', "not JSON"),
        ('{"a": ' + "1" * 5000 + "}", "not JSON"),
        ('{"a": ' + "[" * 5000 + "}", "not JSON"),
    ],
)
def test_lines_that_are_no_rows_are_kept_with_their_faults(tmp_path: Path, line: str, said: str) -> None:
    found = lines(tmp_path, "a.jsonl", f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    assert len(found.rows) == 2 and found.places == ["line 1", "line 3"]
    ((place, wrong),) = found.faults
    assert place == "line 2" and said in wrong


def test_columns_too_few_or_too_many(tmp_path: Path) -> None:
    found = lines(tmp_path, "a.csv", "a,b\n1,2\n3\n4,5,6\n7,8\n")
    assert found.places == ["line 2", "line 5"] and [p for p, _ in found.faults] == ["line 3", "line 4"]
    assert found.faults[0][1] == "1 columns, the header has 2"


def test_a_file_is_bounded_where_it_must_be_small(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a" * 100)
    with pytest.raises(UserError, match="100 bytes"):
        text_of(tmp_path / "a.yaml", 99)
    with pytest.raises(UserError, match="is a folder"):
        text_of(tmp_path)
