"""Reading the rows: JSONL, JSON, CSV, TSV and Parquet files, or a data set by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, overload

from ..errors import UserError, nearest
from .events import OnEvent, Skipped, ignore
from .files import Lines, Row, numbers, rows_of
from .job import Data, columns_of
from .writing import digest

READERS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


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

    def select_columns(self, columns: list[str]) -> Rows: ...

    def select(self, indices: Iterable[int]) -> Rows: ...

    def map(self, function: Callable[[Row], object], *, remove_columns: list[str], new_fingerprint: str) -> Rows: ...

    def train_test_split(self, *, test_size: float, seed: int) -> Mapping[str, Rows]: ...


class Kind(Protocol):
    """What a task knows of rows."""

    def find_labels(self, data: Data, rows: Rows) -> list[str] | None: ...

    def fault(self, data: Data, row: Row, labels: list[str] | None, *, target: bool = True) -> str | None:
        """What is wrong with a row, None where nothing is. target: the column to learn counts, too."""

    def declared(self, data: Data, rows: Rows) -> list[str] | None:
        """Labels known in advance, from the job or the data set."""

    def learned_labels(self, data: Data, rows: Rows) -> set[str]:
        """Those that occur."""


def load(data: Data, seed: int, kind: Kind | None = None, on_event: OnEvent = ignore) -> tuple[Rows, Rows | None]:
    """The training rows and the held-out rows (or None) as `datasets.Dataset`.

    With a task's `kind`, rows that it cannot learn from stop here, with file and line, or are left out and counted where
    `data.skip_bad_rows` asks for it; `data.choices` are the labels then, if the task has them.
    """
    if not data.train:
        raise UserError(
            "No training data. Give --train (or `data: train:`): a JSONL, CSV or Parquet file, or a data set."
        )
    given, held_out = data.choices, None
    train = read(data.train, data, kind, subset=data.subset, on_event=on_event)
    if kind is not None:
        data.choices = kind.find_labels(data, train)
    if isinstance(data.eval, str):
        held_out = (
            read(data.eval, data, kind, subset=data.subset, split="test", on_event=on_event) if data.eval else None
        )
    elif data.eval is not None and data.eval is not False:
        if isinstance(data.eval, bool) or not isinstance(data.eval, (int, float)) or not 0 < data.eval < 1:
            raise UserError(f"data.eval is {data.eval}: expected a file, a data set, or a fraction between 0 and 1.")
        if len(train) < 2:
            raise UserError(f"data.eval is {data.eval}, but there is one row only: nothing is left to train on.")
        parts = train.train_test_split(test_size=float(data.eval), seed=seed)
        train, held_out = parts["train"], parts["test"]
    if kind is not None and given and data.target:
        present = set().union(*(kind.learned_labels(data, part) for part in (train, held_out) if part is not None))
        missing = [c for c in given if c not in present]
        if missing:
            raise UserError(
                f"data.choices (--choice): no row has {', '.join(map(repr, missing[:8]))} in column {data.target!r}, which "
                f"has: {', '.join(sorted(present)[:24])}."
            )
    if data.limit:
        train = train.select(range(min(data.limit, len(train))))
        held_out = held_out.select(range(min(data.limit, len(held_out)))) if held_out is not None else None
    return train, held_out


def read(
    name: str,
    data: Data,
    kind: Kind | None = None,
    *,
    subset: str | None = None,
    split: str = "train",
    target: bool = True,
    on_event: OnEvent = ignore,
) -> Rows:
    """The rows of one file or named data set that are right; the others are named or, if the job says so, left out.

    target: the column to learn is needed. Where it is not and no row has anything there, it does not count.
    """
    found = _found(name, subset, split)
    names = found.columns if isinstance(found, Lines) else found.column_names
    items: Iterable[Row]
    if isinstance(found, Lines):
        items, faults, size = found.rows, list(found.faults), len(found.rows) + len(found.faults)
    else:
        items, faults, size = found, [], len(found)
    if names:
        check_columns(names, data, target=target)
    if isinstance(found, Lines) and found.untyped and data.target in names:
        numbers(found.rows, data.target)
    good = list(range(len(found.rows) if isinstance(found, Lines) else len(found)))
    if kind is not None:
        labels = data.choices if isinstance(found, Lines) else kind.declared(data, found)
        used = [c for c in dict.fromkeys([*columns_of(data), data.text, data.target]) if c in names]
        if not isinstance(found, Lines):
            items = found.select_columns([c for c in used if c is not None])
        wanted = data.target is not None and data.target in names
        if wanted and not target:
            wanted = any(row.get(str(data.target)) not in (None, "") for row in items)
        wrong = {at: said for at, row in enumerate(items) if (said := kind.fault(data, row, labels, target=wanted))}
        faults += [
            (found.places[at] if isinstance(found, Lines) else f"row {at + 1}", said) for at, said in wrong.items()
        ]
        good = [at for at in good if at not in wrong]
    if faults:
        _tell(name, faults, size, data.skip_bad_rows, on_event)
    if isinstance(found, Lines):
        return _table(found, good, name, data.target)
    return found if len(good) == len(found) else found.select(good)


def _tell(name: str, faults: list[tuple[str, str]], size: int, skip: bool, on_event: OnEvent) -> None:
    faults.sort(key=lambda f: int(f[0].split()[1]))
    first = "; ".join(f"{name}, {place}: {wrong}" for place, wrong in faults[:3])
    if len(faults) == size:
        raise UserError(f"None of the {size} rows can be used. {first}.")
    if not skip:
        more = f" (and {len(faults) - 3} more of {size} rows)" if len(faults) > 3 else ""
        raise UserError(f"{first}{more}. Mend the rows, or give --skip-bad-rows to leave such rows out.")
    on_event(Skipped(name, len(faults), size, tuple(faults[:10])))


def rows(name: str, subset: str | None = None, split: str = "train") -> Rows:
    """All rows of one file or named data set. `name:split` picks a split."""
    found = _found(name, subset, split)
    if not isinstance(found, Lines):
        return found
    if found.faults:
        _tell(name, found.faults, len(found.rows) + len(found.faults), False, ignore)
    return _table(found, range(len(found.rows)), name, None)


def _found(name: str, subset: str | None, split: str) -> Lines | Rows:
    import datasets

    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix not in READERS:
            raise UserError(f"Cannot read {name!r}: expected one of {', '.join(READERS)}.")
        if suffix != ".parquet":
            lines = rows_of(path)
            if not lines.rows and not lines.faults:
                raise UserError(f"{name!r} has no rows.")
            return lines
        found = _parquet(path)
    elif suffix in READERS or path.is_dir() or name.startswith(("/", "./", "../", "~")):
        what = f"{name!r} is a folder. Name a file in it" if path.is_dir() else f"There is no data file {name!r}"
        raise UserError(f"{what}. Paths are relative to the job file or the current folder.")
    else:
        dataset, _, chosen = name.partition(":")
        try:
            found = datasets.load_dataset(dataset, subset, split=chosen or split)
        except Exception as error:
            raise UserError(
                f"{name!r} is no file in {Path.cwd()}, and as a data set it cannot be loaded: "
                f"{str(error).strip() or type(error).__name__}"
            ) from None
    if not len(found):
        raise UserError(f"{name!r} has no rows.")
    return found


def _parquet(path: Path) -> Rows:
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        return datasets.Dataset(pyarrow.parquet.read_table(path))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} is not a readable parquet file: {error}") from None


def _table(lines: Lines, good: Sequence[int], name: str, target: str | None) -> Rows:
    import datasets

    if not lines.columns:
        raise UserError(f"{name!r} has rows without any column.")
    columns = {column: [lines.rows[at].get(column) for at in good] for column in lines.columns}
    for column, cells in columns.items():
        try:
            datasets.Dataset.from_dict({column: cells})
        except (ValueError, TypeError, OverflowError, RecursionError, NotImplementedError) as error:
            if column == target and all(isinstance(c, (str, int, float)) for c in cells):
                columns[column] = [str(c) for c in cells]  # labels, some in quotes and some not
                continue
            first: dict[str, str] = {}
            for at, cell in zip(good, cells):
                if cell is not None:
                    first.setdefault(type(cell).__name__, lines.places[at])
            said = " but ".join(f"{kind} in {place}" for kind, place in first.items()) or str(error)
            raise UserError(f"{name}: column {column!r} holds values that do not go together: {said}.") from None
    return datasets.Dataset.from_dict(columns)


def digests(data: Data) -> dict[str, str]:
    """The files that a job's rows come from, by their full paths, each with the digest of its bytes."""
    files = [Path(v).expanduser() for v in (data.train, data.eval) if isinstance(v, str) and v]
    return {str(f.absolute()): digest(f) for f in files if f.is_file()}


def check_columns(names: Sequence[str], data: Data, *, target: bool = True) -> None:
    """The columns that the job names are in the data."""
    text = data.text if not data.template or data.text != "text" else None
    used: dict[str, list[str | None]] = {"data.text": [text], "data.target": [data.target if target else None]}
    used["data.template"] = [*columns_of(data)] if data.template else []
    for key, columns in used.items():
        for column in columns:
            if column and column not in names:
                what = f"{key} names the column" if key == "data.template" else f"{key} is"
                raise UserError(f"{what} {column!r}, but the data has no such column. {nearest(column, names)}")
