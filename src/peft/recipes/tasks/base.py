"""What a task makes of a row: the model's inputs and labels, the score of a model, its predictions."""

from __future__ import annotations

from typing import Any, ClassVar

from ...errors import UserError, nearest
from ..events import OnEvent, ignore
from ..job import Data


class Task:
    """One kind of job. `data` says how rows become inputs; `labels` are the answers it knows, if it has a closed set."""

    type: ClassVar[str]  # peft's TaskType
    auto: ClassVar[str]  # transformers' auto class
    generates: ClassVar[bool] = False  # whether its model writes text

    def __init__(self, data: Data, tokenizer: Any, labels: list[str] | None = None, on_event: OnEvent = ignore) -> None:
        self.data, self.tokenizer, self.labels, self.on_event = data, tokenizer, labels, on_event

    @classmethod
    def find_labels(cls, data: Data, rows: Any) -> list[str] | None:
        """The closed set of answers: as the job gives it, or as the training rows have it."""
        return data.choices

    def model_arguments(self) -> dict[str, Any]:
        return {}

    def encode(self, row: dict[str, Any], *, labels: bool = True) -> dict[str, Any]:
        raise NotImplementedError

    def collator(self) -> Any:
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(self.tokenizer, padding=True)

    def evaluate(self, model: Any, rows: Any, batch_size: int) -> dict[str, float]:
        raise NotImplementedError

    def predict(self, model: Any, rows: Any, batch_size: int) -> list[dict[str, Any]]:
        raise NotImplementedError

    def generate(self, model: Any, prompts: list[str], **settings: Any) -> list[str]:
        """What the model writes after each prompt; only where `generates`."""
        raise NotImplementedError

    def prompt(self, row: dict[str, Any]) -> str:
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

    @property
    def target(self) -> str:
        """The column to learn, for tasks that cannot do without."""
        if self.data.target is None:
            raise UserError(f"data.target is null, but {self.type} learns a column: name it.")
        return self.data.target

    def label_index(self, value: Any) -> int:
        assert self.labels is not None
        if str(value) in self.labels:
            return self.labels.index(str(value))
        raise UserError(f"The label {value!r} in column {self.data.target!r} is none of: {', '.join(self.labels)}.")
