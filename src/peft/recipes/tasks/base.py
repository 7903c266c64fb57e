"""What a task makes of a row: the model's inputs and labels, the score of a model, its predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, TypedDict

from ...errors import UserError, nearest
from ..bases import Model
from ..data import Row, Rows
from ..events import OnEvent, ignore
from ..job import Data

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

    def prompt(self, row: Row) -> str:
        """The row's text in the template."""
        template = self.data.template
        if not template:
            return str(row[self.data.text])
        try:
            return template.format_map({**row, "text": row.get(self.data.text, row.get("text"))})
        except (KeyError, IndexError) as missing:
            raise UserError(
                f"data.template names the column {missing}, which the row lacks. {nearest(str(missing), row)}"
            ) from None

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
