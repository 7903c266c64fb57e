"""What a task makes of a row: the model's inputs and labels, the score of a model, its predictions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .console import UserError, near
from .job import Data
from .likelihood import batches


class Task:
    """One kind of job. `columns` says how rows become inputs; `labels` are the answers it knows, if it has a closed set."""

    type: ClassVar[str]  # peft's TaskType
    auto: ClassVar[str]  # transformers' auto class
    generates: ClassVar[bool] = False

    def __init__(self, data: Data, tokenizer: Any, labels: list[str] | None = None) -> None:
        self.data, self.tokenizer, self.labels = data, tokenizer, labels

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

    def prompt(self, row: dict[str, Any]) -> str:
        """The row's text in the template."""
        template = self.data.template
        if not template:
            return str(row[self.data.text])
        try:
            return template.format_map({**row, "text": row.get(self.data.text, row.get("text"))})
        except (KeyError, IndexError) as missing:
            raise UserError(
                f"data.template names the column {missing}, which the row lacks. {near(str(missing), row)}"
            ) from None

    def label_index(self, value: Any) -> int:
        assert self.labels is not None
        if str(value) in self.labels:
            return self.labels.index(str(value))
        raise UserError(f"The label {value!r} in column {self.data.target!r} is none of: {', '.join(self.labels)}.")


class Classifier(Task):
    """Shared by the tasks whose model has one output for each label."""

    def model_arguments(self) -> dict[str, Any]:
        assert self.labels is not None
        return {"id2label": dict(enumerate(self.labels)), "label2id": {name: i for i, name in enumerate(self.labels)}}

    @torch.no_grad()
    def logits(self, model: Any, rows: Any, batch_size: int, title: str) -> list[torch.Tensor]:
        """Each row's logits on the CPU, without its padding."""
        model.eval()
        encoded = [self.encode(row, labels=False) for row in rows]
        found: list[torch.Tensor] = [torch.empty(0)] * len(encoded)
        for chosen in batches([len(e["input_ids"]) for e in encoded], batch_size, title):
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
    def find_labels(cls, data: Data, rows: Any) -> list[str]:
        return data.choices or _names(rows, data.target) or sorted({str(v) for v in rows[data.target]})

    def encode(self, row: dict[str, Any], *, labels: bool = True) -> dict[str, Any]:
        found = self.tokenizer(self.prompt(row), truncation=True, max_length=self.data.max_length)
        found = {k: found[k] for k in ("input_ids", "attention_mask")}
        return found | ({"labels": self.label_index(_name(row[self.data.target], self.labels))} if labels else {})

    def collator(self) -> Any:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(self.tokenizer)

    def evaluate(self, model: Any, rows: Any, batch_size: int) -> dict[str, float]:
        logits = torch.stack(self.logits(model, rows, batch_size, "evaluating"))
        right = torch.tensor([self.label_index(_name(v, self.labels)) for v in rows[self.data.target]])
        loss = torch.nn.functional.cross_entropy(logits, right)
        return {"accuracy": (logits.argmax(-1) == right).float().mean().item(), "loss": loss.item(), "rows": len(right)}

    def predict(self, model: Any, rows: Any, batch_size: int) -> list[dict[str, Any]]:
        assert self.labels is not None
        found = [r.softmax(-1) for r in self.logits(model, rows, batch_size, "predicting")]
        return [{"prediction": self.labels[int(p.argmax())], "probability": round(p.max().item(), 4)} for p in found]


class TokenClassification(Classifier):
    type = "TOKEN_CLS"
    auto = "AutoModelForTokenClassification"

    @classmethod
    def find_labels(cls, data: Data, rows: Any) -> list[str]:
        known = data.choices or _names(rows, data.target)
        return known or sorted({str(v) for values in rows[data.target] for v in values})

    def words(self, row: dict[str, Any]) -> list[str]:
        text = row[self.data.text]
        return text.split() if isinstance(text, str) else list(text)

    def encode(self, row: dict[str, Any], *, labels: bool = True) -> dict[str, Any]:
        words = self.words(row)
        found = self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.data.max_length)
        encoded = {k: found[k] for k in ("input_ids", "attention_mask")}
        # the first token of each word carries the word's label, the others none
        owners = found.word_ids()
        first = [w if w is not None and (i == 0 or owners[i - 1] != w) else None for i, w in enumerate(owners)]
        if not labels:
            return encoded | {"first": first}
        tags = row[self.data.target]
        if len(tags) != len(words):
            raise UserError(
                f"A row has {len(words)} words but {len(tags)} labels in column {self.data.target!r}: {words[:8]} ..."
            )
        return encoded | {
            "labels": [-100 if w is None else self.label_index(_name(tags[w], self.labels)) for w in first]
        }

    def collator(self) -> Any:
        from transformers import DataCollatorForTokenClassification

        return DataCollatorForTokenClassification(self.tokenizer)

    def evaluate(self, model: Any, rows: Any, batch_size: int) -> dict[str, float]:
        logits = torch.cat(self.logits(model, rows, batch_size, "evaluating"))
        right = torch.cat([torch.tensor(self.encode(row)["labels"]) for row in rows])
        logits, right = logits[right >= 0], right[right >= 0]
        loss = torch.nn.functional.cross_entropy(logits, right)
        return {
            "accuracy": (logits.argmax(-1) == right).float().mean().item(),
            "loss": loss.item(),
            "tokens": len(right),
        }

    def predict(self, model: Any, rows: Any, batch_size: int) -> list[dict[str, Any]]:
        assert self.labels is not None
        found = []
        for row, logits in zip(rows, self.logits(model, rows, batch_size, "predicting")):
            best = logits.argmax(-1).tolist()
            tags = {
                w: self.labels[best[i]] for i, w in enumerate(self.encode(row, labels=False)["first"]) if w is not None
            }
            words = self.words(row)
            found.append({"words": words, "prediction": [tags.get(i) for i in range(len(words))]})
        return found


def _names(rows: Any, column: str | None) -> list[str] | None:
    """Label names that the data set itself declares."""
    feature = rows.features.get(column)
    return getattr(getattr(feature, "feature", feature), "names", None)


def _name(value: Any, labels: list[str] | None) -> Any:
    """A row's label by name: data sets store declared labels as their index."""
    if labels and isinstance(value, int) and str(value) not in labels and 0 <= value < len(labels):
        return labels[value]
    return value
