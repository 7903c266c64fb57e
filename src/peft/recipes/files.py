"""Files of rows and of settings as text, and rows with the lines they stand on. Nothing here speaks to a network."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import UserError
from ..local_files import repeated

Row: TypeAlias = dict[str, Any]  # a row's cells by column, of whatever type the data has

LONGEST = 16 << 20  # characters of a line
DELIMITERS = {".tsv": "\t", ".csv": ",;\t|"}
PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


@dataclass
class Lines:
    """The rows of a file with where each stands (`line 3`), and what was wrong with those that are no rows."""

    rows: list[Row] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    untyped: bool = False  # a table's cells are all text

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for row in self.rows for column in row))

    def add(self, place: str, row: object) -> None:
        wrong = _wrong(row)
        if wrong:
            self.faults.append((place, wrong))
        else:
            assert isinstance(row, dict)
            self.rows.append(row)
            self.places.append(place)


def text_of(path: Path, most: int | None = None) -> str:
    """A text file in UTF-8, with or without a mark at its beginning. most: how many bytes it may have."""
    if path.is_dir():
        raise UserError(f"{path} is a folder. Name a file.")
    size = path.stat().st_size
    if most is not None and size > most:
        raise UserError(f"{path} has {size} bytes, more than such a file can need ({most}). Is it the right one?")
    raw = path.read_bytes()
    for magic, packed in PACKED.items():
        if raw.startswith(magic):
            raise UserError(f"{path} is a {packed} archive. Unpack it first.")
    if raw.startswith(WIDE):
        raise UserError(f"{path} is written in UTF-16 or UTF-32. Save it as UTF-8.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8. Save it as UTF-8.") from None
    if "\0" in text and text.strip("\0 \r\n\t"):  # nothing but zeros is what a crash leaves: an empty file
        raise UserError(
            f"{path}, line {text.count(chr(10), 0, text.index(chr(0))) + 1}: a NUL byte. Is it a text file?"
        )
    return text


def rows_of(path: Path) -> Lines:
    """The rows of a JSONL, JSON, CSV or TSV file."""
    text = text_of(path)
    if not text.strip("\0 \r\n\t"):
        raise UserError(f"{str(path)!r} is empty: it has no rows.")
    suffix = path.suffix.lower()
    if suffix in DELIMITERS:
        return _table(text, DELIMITERS[suffix], path)
    if suffix == ".json" and text.lstrip().startswith("["):
        return _array(text, path)
    found = Lines()
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.add(f"line {n}", _parsed(line))
            except UserError as error:
                found.faults.append((f"line {n}", str(error)))
    if suffix == ".json" and not found.rows:
        try:
            _parsed(text)
        except UserError as error:
            raise UserError(f"{path} is not JSON: {error}.") from None
        raise UserError(f"{path} holds no list of rows. Expected [{{...}}, {{...}}], or one {{...}} a line.")
    return found


# -- JSON ---------------------------------------------------------------------------------------------------------------
def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if (name := repeated([n for n, _ in pairs])) is not None:
        raise UserError(f"the key {name!r} stands there twice")
    return dict(pairs)


DECODER = json.JSONDecoder(object_pairs_hook=_pairs)


def _parsed(text: str) -> object:
    if len(text) > LONGEST:
        raise UserError(f"a line of {len(text)} characters, at most {LONGEST} are read")
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise UserError("not JSON that can be read: it is nested too deeply") from None
    except UserError:
        raise
    except ValueError as error:  # numbers of thousands of digits
        raise UserError(f"not JSON that can be read ({error})") from None


def _array(text: str, path: Path) -> Lines:
    found, at, line = Lines(), text.index("[") + 1, text.count("\n", 0, text.index("[")) + 1
    separator, first = "", True
    while True:
        end = _past_space(text, at)
        line, at = line + text.count("\n", at, end), end
        if text[at : at + 1] == "]" and (first or not separator):
            break
        try:
            row, end = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(f"{path}, line {line}: not JSON ({said}). Mend the file.") from None
        found.add(f"line {line}", row)
        line, at = line + text.count("\n", at, end), end
        end = _past_space(text, at)
        line, at, first = line + text.count("\n", at, end), end, False
        separator = text[at : at + 1]
        if separator == ",":
            at += 1
        elif separator == "]":
            break
        else:
            raise UserError(f"{path}, line {line}: not JSON (a comma or ] is missing after a row). Mend the file.")
    if text[at + 1 :].strip():
        raise UserError(f"{path}: not JSON (there is more after the list of rows). Mend the file.")
    return found


def _past_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _wrong(row: object) -> str | None:
    if not isinstance(row, dict):
        return f"a {type(row).__name__}, expected a row such as {{...}} with a value for each column"
    try:
        for value in _strings(row):
            value.encode("utf-8")
    except UnicodeEncodeError:
        return "half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    except RecursionError:
        return "nested too deeply"
    return None


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, held in value.items():
            yield key
            yield from _strings(held)
    elif isinstance(value, list):
        for held in value:
            yield from _strings(held)


# -- CSV ----------------------------------------------------------------------------------------------------------------
def _table(text: str, delimiters: str, path: Path) -> Lines:
    delimiter = max(delimiters, key=lambda d: (_agreement(text, d), -delimiters.index(d)))
    found, known = Lines(untyped=True), csv.field_size_limit(LONGEST)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    begins = 1
    try:
        header: list[str] | None = None
        for cells in reader:
            place, begins = f"line {begins}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _header(cells, path, place)
            elif len(cells) != len(header):
                found.faults.append((place, f"{len(cells)} columns, the header has {len(header)}"))
            else:
                found.add(place, dict(zip(header, cells)))
    except csv.Error as error:
        raise UserError(f"{path}, line {begins}: not CSV ({error}). Is a quotation mark left open?") from None
    finally:
        csv.field_size_limit(known)
    return found


def numbers(rows: list[Row], column: str) -> None:
    """Cells of a table's column become whole numbers, if all that are not empty are written so."""
    whole, filled = re.compile(r"-?(0|[1-9]\d{0,17})", re.ASCII), [row for row in rows if row[column] != ""]
    if all(whole.fullmatch(row[column]) for row in filled):
        for row in filled:
            row[column] = int(row[column])


def _header(cells: list[str], path: Path, place: str) -> list[str]:
    names = [c.strip() for c in cells]
    for name in names:
        if not name or names.count(name) > 1:
            what = f"names the column {name!r} twice" if name else "has a column without a name"
            raise UserError(f"{path}, {place}: the header {what}. Each column needs a name of its own.")
    return names


def _agreement(text: str, delimiter: str) -> tuple[bool, int]:
    """Whether the first rows have as many columns as the header by that delimiter, and how many."""
    sample = text[: 1 << 16]
    counts: list[int] = []
    try:
        for cells in csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter):
            if cells:
                counts.append(len(cells))
            if len(counts) == 20:
                break
    except csv.Error:
        pass
    if len(counts) > 2 and len(sample) < len(text) and len(counts) < 20:
        counts.pop()  # cut by the sample's end
    if not counts or counts[0] < 2:
        return False, 1
    return sum(c == counts[0] for c in counts) * 2 > len(counts), counts[0]
