"""What a task makes of a row: the model's inputs and labels, the score of a model, its predictions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, TypedDict

from ...errors import UserError, nearest
from ..bases import Model
from ..checks import pieces
from ..data import Row, Rows
from ..events import OnEvent, ignore
from ..job import Data, columns_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.data.data_collator import DataCollator


class Encoded(TypedDict, total=False):
    """A row as the model's inputs. labels: one for each token, or the one of the whole text."""

    input_ids: list[int]
    attention_mask: list[int]
    labels: list[int] | int
    first: list[int | None]  # which word begins at a token, if one does


class LabelNames(TypedDict, total=False):
    """What a model's config says of its labels."""

    id2label: dict[int, str]
    label2id: dict[str, int]


class Answer(TypedDict, total=False):
    """What a model says of a row. words: those that the labels in `prediction` are about, one each."""

    words: list[str]
    prediction: str | list[str | None]
    probability: float


class Task:
    """One kind of job. `data` says how rows become inputs; `labels` are the answers it knows, if it has a closed set."""

    type: ClassVar[str]  # peft's TaskType
    auto: ClassVar[str]  # transformers' auto class
    generates: ClassVar[bool] = False  # whether its model writes text

    def __init__(
        self,
        data: Data,
        tokenizer: PreTrainedTokenizerBase,
        labels: list[str] | None = None,
        on_event: OnEvent = ignore,
    ) -> None:
        self.data, self.tokenizer, self.labels, self.on_event = data, tokenizer, labels, on_event

    @classmethod
    def find_labels(cls, data: Data, rows: Rows) -> list[str] | None:
        """The closed set of answers: as the job gives it, or as the training rows have it."""
        return data.choices

    def model_arguments(self) -> LabelNames:
        return {}

    def encode(self, row: Row, *, labels: bool = True) -> Encoded:
        raise NotImplementedError

    def collator(self) -> DataCollator:
        """What makes a batch of encoded rows."""
        raise NotImplementedError

    def evaluate(self, model: Model, rows: Rows, batch_size: int) -> dict[str, float]:
        raise NotImplementedError

    def predict(self, model: Model, rows: Rows, batch_size: int) -> list[Answer]:
        raise NotImplementedError

    def generate(self, model: Model, prompts: list[str], **settings: object) -> list[str]:
        """What the model writes after each prompt; only where `generates`."""
        raise NotImplementedError

    @classmethod
    def declared(cls, data: Data, rows: Rows) -> list[str] | None:
        """The labels that a row may have, as far as they are known before the rows are looked at."""
        return data.choices

    @classmethod
    def learned_labels(cls, data: Data, rows: Rows) -> set[str]:
        """The labels that the rows have."""
        return {str(value) for value in rows[cls.learned(data)]}

    @classmethod
    def fault(cls, data: Data, row: Row, labels: list[str] | None, *, target: bool = True) -> str | None:
        """What is wrong with a row, None where nothing is. target: the column to learn counts, too."""
        for column in columns_of(data):
            wrong = text_fault(column, row.get(column), text=column == data.text)
            if wrong:
                return wrong
        return label_fault(data.target, row.get(data.target), labels) if target and data.target is not None else None

    def prompt(self, row: Row) -> str:
        """The row's text in the template."""
        template = self.data.template
        if not template:
            return str(row[self.data.text])
        try:
            return "".join(
                before + ("" if name is None else str(self._cell(row, name))) for before, name in pieces(template)
            )
        except KeyError as missing:
            name = str(missing.args[0])
            raise UserError(
                f"data.template names the column {name!r}, which the row lacks. {nearest(name, row)}"
            ) from None

    def shown(self, row: Row) -> str:
        """What a person is shown of a row: its text, or its prompt where the text is not read."""
        text = row.get(self.data.text)
        return self.prompt(row) if text is None else str(text)

    def _cell(self, row: Row, name: str) -> object:
        return row[self.data.text if name == "text" else name]

    @classmethod
    def learned(cls, data: Data) -> str:
        """The column to learn, for tasks that cannot do without."""
        if data.target is None:
            raise UserError(f"data.target is null, but {cls.type} learns a column: name it.")
        return data.target

    @property
    def target(self) -> str:
        return self.learned(self.data)

    def label_index(self, value: object) -> int:
        assert self.labels is not None
        if str(value) in self.labels:
            return self.labels.index(str(value))
        raise UserError(f"The label {value!r} in column {self.data.target!r} is none of: {', '.join(self.labels)}.")


def text_fault(column: str, value: object, *, text: bool = True) -> str | None:
    """What is wrong with a cell that goes into a prompt. text: it is what is read; other columns of a template may be
    numbers, or empty."""
    if value is None:
        return f"column {column!r} is missing or null"
    if isinstance(value, str):
        return f"column {column!r} is empty" if text and not value.strip() else None
    if not text and isinstance(value, (int, float)):
        return None if math.isfinite(value) else f"column {column!r} is {value}"
    return f"column {column!r} is {repr(value)[:60]} ({type(value).__name__}), expected text"


def label_fault(column: str | None, value: object, labels: list[str] | None) -> str | None:
    """What is wrong with a cell that is learned."""
    if value is None:
        return f"column {column!r} is missing or null"
    if not isinstance(value, (str, int, float)):
        return f"column {column!r} is {repr(value)[:60]} ({type(value).__name__}), expected text"
    if isinstance(value, float) and not math.isfinite(value):
        return f"column {column!r} is {value}"
    if not str(value).strip():
        return f"column {column!r} is empty"
    if labels is not None and str(value) not in labels:
        shown = ", ".join(labels[:24]) + (" ..." if len(labels) > 24 else "")
        return f"column {column!r} is {repr(value)[:60]}, which is none of: {shown}"
    return None
