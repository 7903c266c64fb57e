"""The two tasks whose model writes text. With `choices`, answers are scored by their likelihood (`recipes/likelihood.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

import torch

from .. import likelihood
from ..bases import Model
from ..data import Row, Rows
from ..events import OnEvent
from ..likelihood import batches
from .base import Answer, Encoded, Task

if TYPE_CHECKING:
    from transformers import DataCollatorForSeq2Seq


class Writer(Protocol):
    """A model that writes: transformers gives `generate` to the classes with a language head only."""

    def generate(self, **inputs: object) -> torch.Tensor: ...


class Text(Task):
    """Shared by causal and encoder-decoder models."""

    generates = True
    score: ClassVar[Callable[[Model, list[list[int]], list[list[list[int]]], int, int, str, OnEvent], torch.Tensor]]

    def collator(self) -> DataCollatorForSeq2Seq:
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(self.tokenizer, padding=True)

    def split(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """The tokens of prompt and answer, without an end token."""
        raise NotImplementedError

    def answers(self, rows: Rows) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Every row's prompt, and for every choice the tokens of that answer to it."""
        prompts, given = [], []
        for row in rows:
            pairs = [self.split(self.prompt(row), choice) for choice in self.labels or []]
            prompts.append(pairs[0][0])
            given.append([tokens for _, tokens in pairs])
        return prompts, given

    def likelihoods(self, model: Model, rows: Rows, batch_size: int, title: str) -> torch.Tensor:
        model.eval()
        prompts, given = self.answers(rows)
        pad_id = self.tokenizer.pad_token_id
        return type(self).score(model, prompts, given, pad_id, batch_size, title, self.on_event)

    def evaluate(self, model: Model, rows: Rows, batch_size: int) -> dict[str, float]:
        if self.labels and self.data.target:
            scores = self.likelihoods(model, rows, batch_size, "evaluating")
            right = torch.tensor([self.label_index(v) for v in rows[self.data.target]])
            found = {"accuracy": (scores.argmax(-1) == right).double().mean().item()}
            return found | {"log_likelihood": scores[torch.arange(len(right)), right].mean().item(), "rows": len(right)}
        return self.loss(model, rows, batch_size)

    @torch.no_grad()
    def loss(self, model: Model, rows: Rows, batch_size: int) -> dict[str, float]:
        """Mean loss of a target token, where there is no closed set of answers."""
        model.eval()
        encoded = [self.encode(row) for row in rows]
        collate, total, count = self.collator(), 0.0, 0
        for chosen in batches([len(e["input_ids"]) for e in encoded], batch_size, "evaluating", self.on_event):
            batch = collate([encoded[i] for i in chosen]).to(model.device)
            tokens = int((batch["labels"] != -100).sum())
            total, count = total + float(model(**batch).loss) * tokens, count + tokens
        return {"loss": total / count, "tokens": count}

    def predict(self, model: Model, rows: Rows, batch_size: int) -> list[Answer]:
        if not self.labels:
            return [{"prediction": text} for text in self.generate(model, [self.prompt(row) for row in rows])]
        scores = self.likelihoods(model, rows, batch_size, "predicting").softmax(-1)
        return [{"prediction": self.labels[int(p.argmax())], "probability": round(p.max().item(), 4)} for p in scores]

    @torch.no_grad()
    def generate(self, model: Model, prompts: list[str], **settings: object) -> list[str]:
        """Greedy unless told otherwise."""
        model.eval()
        settings = {"do_sample": False, "max_new_tokens": 32, "pad_token_id": self.tokenizer.pad_token_id} | settings
        found = []
        for prompt in prompts:
            ids = torch.tensor([self.prompt_ids(prompt)], device=model.device)
            out = cast(Writer, model).generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0]
            found.append(str(self.tokenizer.decode(self.written(out, ids[0]), skip_special_tokens=True)).strip())
        return found

    def prompt_ids(self, prompt: str) -> list[int]:
        raise NotImplementedError

    def written(self, out: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """The new tokens of what `generate` returns."""
        return out


class CausalLM(Text):
    """Trains on the answer only (or on the whole text when there is no target).

    White space at a prompt's end goes to the answer, where byte-pair tokenizers have it: `Label : ` + `complaint` is
    read as `Label :` + ` complaint`.
    """

    type = "CAUSAL_LM"
    auto = "AutoModelForCausalLM"
    score = likelihood.causal

    def split(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        head = prompt.rstrip()
        answer = prompt[len(head) :] + answer
        before, whole = self._ids(head), self._ids(head + answer)
        if whole[: len(before)] == before and len(whole) > len(before):
            tokens = whole[len(before) :]
        else:  # the tokenizer merges over the seam
            tokens = self.tokenizer(answer, add_special_tokens=False).input_ids
        return before[-max(1, self.data.max_length - len(tokens)) :], tokens

    def prompt(self, row: Row) -> str:
        """Without a template a line's end parts the text from what is learned."""
        found = super().prompt(row)
        return found if self.data.template or self.data.target is None else f"{found.rstrip()}\n"

    def encode(self, row: Row, *, labels: bool = True) -> Encoded:
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        if self.data.target is None:
            ids = (self._ids(self.prompt(row)) + end)[: self.data.max_length]
            return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)}
        before, tokens = self.split(self.prompt(row), str(row[self.data.target]))
        tokens = (tokens + end)[: self.data.max_length - 1]
        before = before[-(self.data.max_length - len(tokens)) :]
        ids = before + tokens
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(before) + tokens}

    def prompt_ids(self, prompt: str) -> list[int]:
        return self._ids(prompt.rstrip() or prompt)

    def written(self, out: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return out[len(prompt) :] if torch.equal(out[: len(prompt)], prompt) else out

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text).input_ids
        return ids[:-1] if ids and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids


class Seq2SeqLM(Text):
    """The encoder reads the prompt, the decoder learns the answer."""

    type = "SEQ_2_SEQ_LM"
    auto = "AutoModelForSeq2SeqLM"
    score = likelihood.seq2seq

    def split(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        return self.prompt_ids(prompt), self.tokenizer(text_target=answer, add_special_tokens=False).input_ids

    def encode(self, row: Row, *, labels: bool = True) -> Encoded:
        ids = self.prompt_ids(self.prompt(row))
        target = self.tokenizer(text_target=str(row[self.target]), truncation=True, max_length=self.data.max_length)
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": target.input_ids}

    def prompt_ids(self, prompt: str) -> list[int]:
        return self.tokenizer(prompt, truncation=True, max_length=self.data.max_length).input_ids
