"""The tasks whose model has one output for each label: of a whole text, or of each of its words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...errors import UserError
from ..bases import Model
from ..data import Row, Rows
from ..job import Data
from ..likelihood import batches
from .base import Answer, Encoded, LabelNames, Task, label_fault, text_fault

if TYPE_CHECKING:
    from transformers.data.data_collator import DataCollator


class Classifier(Task):
    """Shared by the tasks whose model has one output for each label."""

    def model_arguments(self) -> LabelNames:
        assert self.labels is not None
        return {"id2label": dict(enumerate(self.labels)), "label2id": {name: i for i, name in enumerate(self.labels)}}

    @classmethod
    def declared(cls, data: Data, rows: Rows) -> list[str] | None:
        return data.choices or _names(rows, data.target)

    @torch.no_grad()
    def logits(self, model: Model, rows: Rows, batch_size: int, title: str) -> list[torch.Tensor]:
        """Each row's logits on the CPU, without its padding."""
        model.eval()
        encoded = [self.encode(row, labels=False) for row in rows]
        found: list[torch.Tensor] = [torch.empty(0)] * len(encoded)
        for chosen in batches([len(e["input_ids"]) for e in encoded], batch_size, title, self.on_event):
            features = {k: [encoded[i][k] for i in chosen] for k in ("input_ids", "attention_mask")}
            batch = self.tokenizer.pad(features, padding_side="right", return_tensors="pt").to(model.device)
            out = model(**batch).logits.float().cpu()
            for at, i in enumerate(chosen):
                found[i] = out[at] if out.dim() == 2 else out[at, : len(encoded[i]["input_ids"])]
        return found


class SequenceClassification(Classifier):
    type = "SEQ_CLS"
    auto = "AutoModelForSequenceClassification"

    @classmethod
    def find_labels(cls, data: Data, rows: Rows) -> list[str]:
        return data.choices or _names(rows, data.target) or sorted({str(v) for v in rows[cls.learned(data)]})

    @classmethod
    def learned_labels(cls, data: Data, rows: Rows) -> set[str]:
        return {str(_name(value, data.choices)) for value in rows[cls.learned(data)]}

    @classmethod
    def fault(cls, data: Data, row: Row, labels: list[str] | None, *, target: bool = True) -> str | None:
        named = row | {cls.learned(data): _name(row.get(cls.learned(data)), labels)} if target else row
        return super().fault(data, named, labels, target=target)

    def encode(self, row: Row, *, labels: bool = True) -> Encoded:
        found = self.tokenizer(self.prompt(row), truncation=True, max_length=self.data.max_length)
        encoded: Encoded = {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}
        if labels:
            encoded["labels"] = self.label_index(_name(row[self.target], self.labels))
        return encoded

    def collator(self) -> DataCollator:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(self.tokenizer)

    def evaluate(self, model: Model, rows: Rows, batch_size: int) -> dict[str, float]:
        logits = torch.stack(self.logits(model, rows, batch_size, "evaluating"))
        right = torch.tensor([self.label_index(_name(v, self.labels)) for v in rows[self.target]])
        loss = torch.nn.functional.cross_entropy(logits, right)
        return {"accuracy": (logits.argmax(-1) == right).float().mean().item(), "loss": loss.item(), "rows": len(right)}

    def predict(self, model: Model, rows: Rows, batch_size: int) -> list[Answer]:
        assert self.labels is not None
        found = [r.softmax(-1) for r in self.logits(model, rows, batch_size, "predicting")]
        return [{"prediction": self.labels[int(p.argmax())], "probability": round(p.max().item(), 4)} for p in found]


class TokenClassification(Classifier):
    type = "TOKEN_CLS"
    auto = "AutoModelForTokenClassification"

    @classmethod
    def find_labels(cls, data: Data, rows: Rows) -> list[str]:
        known = data.choices or _names(rows, data.target)
        return known or sorted({str(v) for values in rows[cls.learned(data)] for v in values})

    @classmethod
    def learned_labels(cls, data: Data, rows: Rows) -> set[str]:
        return {str(_name(value, data.choices)) for values in rows[cls.learned(data)] for value in values}

    @classmethod
    def fault(cls, data: Data, row: Row, labels: list[str] | None, *, target: bool = True) -> str | None:
        words = row.get(data.text)
        if isinstance(words, str):
            words = words.split() or words
        if not isinstance(words, list) or not words:
            return f"column {data.text!r} has no words" if words == [] else text_fault(data.text, words)
        wrong = next(filter(None, (text_fault(data.text, word) for word in words)), None)
        if wrong or not target:
            return wrong and f"a word of {wrong}"
        tags = row.get(cls.learned(data))
        if not isinstance(tags, list):
            return f"column {data.target!r} is {repr(tags)[:60]}, expected a list of labels, one for each word"
        if len(tags) != len(words):
            return f"{len(words)} words but {len(tags)} labels in column {data.target!r}"
        return next(filter(None, (label_fault(data.target, _name(tag, labels), labels) for tag in tags)), None)

    def words(self, row: Row) -> list[str]:
        text = row[self.data.text]
        return text.split() if isinstance(text, str) else list(text)

    def encode(self, row: Row, *, labels: bool = True) -> Encoded:
        words = self.words(row)
        found = self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.data.max_length)
        encoded: Encoded = {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}
        # the first token of each word carries the word's label, the others none
        owners = found.word_ids()
        first = [w if w is not None and (i == 0 or owners[i - 1] != w) else None for i, w in enumerate(owners)]
        if not labels:
            encoded["first"] = first
            return encoded
        tags = row[self.target]
        if len(tags) != len(words):
            raise UserError(
                f"A row has {len(words)} words but {len(tags)} labels in column {self.data.target!r}: {words[:8]} ..."
            )
        encoded["labels"] = [-100 if w is None else self.label_index(_name(tags[w], self.labels)) for w in first]
        return encoded

    def collator(self) -> DataCollator:
        from transformers import DataCollatorForTokenClassification

        return DataCollatorForTokenClassification(self.tokenizer)

    def evaluate(self, model: Model, rows: Rows, batch_size: int) -> dict[str, float]:
        logits = torch.cat(self.logits(model, rows, batch_size, "evaluating"))
        right = torch.cat([torch.tensor(self.encode(row)["labels"]) for row in rows])
        logits, right = logits[right >= 0], right[right >= 0]
        loss = torch.nn.functional.cross_entropy(logits, right)
        return {
            "accuracy": (logits.argmax(-1) == right).float().mean().item(),
            "loss": loss.item(),
            "tokens": len(right),
        }

    def predict(self, model: Model, rows: Rows, batch_size: int) -> list[Answer]:
        assert self.labels is not None
        found: list[Answer] = []
        for row, logits in zip(rows, self.logits(model, rows, batch_size, "predicting")):
            best = logits.argmax(-1).tolist()
            tags = {
                w: self.labels[best[i]] for i, w in enumerate(self.encode(row, labels=False)["first"]) if w is not None
            }
            words = self.words(row)
            found.append({"words": words, "prediction": [tags.get(i) for i in range(len(words))]})
        return found


def _names(rows: Rows, column: str | None) -> list[str] | None:
    """Label names that the data set itself declares."""
    feature = rows.features.get(column) if column else None
    return getattr(getattr(feature, "feature", feature), "names", None)


def _name(value: object, labels: list[str] | None) -> object:
    """A row's label by name: data sets store declared labels as their index."""
    if (
        labels
        and isinstance(value, int)
        and not isinstance(value, bool)
        and str(value) not in labels
        and 0 <= value < len(labels)
    ):
        return labels[value]
    return value
