"""Reading the rows: JSONL, JSON, CSV, TSV and Parquet files, or a data set by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, overload

from ..errors import UserError, nearest
from .job import Data
from .writing import digest

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}

Row: TypeAlias = dict[str, Any]  # a row's cells by column, of whatever type the data has


class Rows(Protocol):
    """What is used of a `datasets.Dataset`."""

    @property
    def column_names(self) -> list[str]: ...

    @property
    def features(self) -> Mapping[str, object]: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Row]: ...

    @overload
    def __getitem__(self, column: str, /) -> Sequence[Any]: ...

    @overload
    def __getitem__(self, row: int, /) -> Row: ...

    def select(self, indices: Iterable[int]) -> Rows: ...

    def map(self, function: Callable[[Row], object], *, remove_columns: list[str], new_fingerprint: str) -> Rows: ...

    def train_test_split(self, *, test_size: float, seed: int) -> Mapping[str, Rows]: ...


def load(data: Data, seed: int) -> tuple[Rows, Rows | None]:
    """The training rows and the held-out rows (or None) as `datasets.Dataset`."""
    if not data.train:
        raise UserError(
            "No training data. Give --train (or `data: train:`): a JSONL, CSV or Parquet file, or a data set."
        )
    train = rows(data.train, data.subset, "train")
    held_out = None
    if isinstance(data.eval, str):
        held_out = rows(data.eval, data.subset, "test") if data.eval else None
    elif data.eval is not None and data.eval is not False:
        if isinstance(data.eval, bool) or not isinstance(data.eval, (int, float)) or not 0 < data.eval < 1:
            raise UserError(f"data.eval is {data.eval}: expected a file, a data set, or a fraction between 0 and 1.")
        parts = train.train_test_split(test_size=float(data.eval), seed=seed)
        train, held_out = parts["train"], parts["test"]
    if data.limit:
        train = train.select(range(min(data.limit, len(train))))
        held_out = held_out.select(range(min(data.limit, len(held_out)))) if held_out is not None else None
    for part in (train, held_out):
        if part is not None:
            check_columns(part, data)
    return train, held_out


def rows(name: str, subset: str | None = None, split: str = "train") -> Rows:
    """All rows of one file or named data set. `name:split` picks a split."""
    import datasets

    path = Path(name).expanduser()
    reader = READERS.get(path.suffix.lower())
    if path.is_file():
        if reader is None:
            raise UserError(f"Cannot read {name!r}: expected one of {', '.join(READERS)}.")
        extra = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
        try:
            found = datasets.load_dataset(reader, data_files=str(path), split="train", **extra)
        except (datasets.exceptions.DatasetGenerationError, StopIteration) as error:
            raise UserError(f"{name!r} is not a readable {reader} file: {error.__cause__ or error}") from None
    elif reader is not None or path.is_dir():
        raise UserError(f"There is no data file {name!r}. Paths are relative to the job file or the current folder.")
    else:
        dataset, _, chosen = name.partition(":")
        found = datasets.load_dataset(dataset, subset, split=chosen or split)
    if not len(found):
        raise UserError(f"{name!r} has no rows.")
    return found


def digests(data: Data) -> dict[str, str]:
    """The files that a job's rows come from, by their full paths, each with the digest of its bytes."""
    files = [Path(v).expanduser() for v in (data.train, data.eval) if isinstance(v, str) and v]
    return {str(f.absolute()): digest(f) for f in files if f.is_file()}


def check_columns(part: Rows, data: Data, *, target: bool = True) -> None:
    """The columns that the job names are in the data."""
    used = {
        "data.text": data.text if "{" not in (data.template or "") else None,
        "data.target": data.target if target else None,
    }
    for key, column in used.items():
        if column and column not in part.column_names:
            raise UserError(
                f"{key} is {column!r}, but the data has no such column. {nearest(column, part.column_names)}"
            )
