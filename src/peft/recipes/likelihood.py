"""Scoring given answers: the log-probability of each answer's tokens after the prompt, summed.

The sum, not the mean, is the model's probability of that answer and no other; the end-of-text token is left out, so that
base models are not marked down for going on. A base and its adapter are scored by the same function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .bases import Model
from .events import OnEvent, ignore, track


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model under an adapter."""
    below: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    return model if below is None else below()


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return name in inspect.signature(unwrapped(model).forward).parameters


def pad(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def batches(lengths: list[int], batch_size: int, title: str, on_event: OnEvent) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, with their progress told."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    yield from track([order[i : i + batch_size] for i in range(0, len(order), batch_size)], title, on_event)


@torch.no_grad()
def causal(
    model: Model,
    prompts: list[list[int]],
    answers: list[list[list[int]]],
    pad_id: int,
    batch_size: int = 16,
    title: str = "scoring",
    on_event: OnEvent = ignore,
) -> Tensor:
    """Log-probabilities `[row, answer]` under a causal model.

    One forward per row serves all answers that share its tokens: the logits after prompt + `no` score `no complaint`,
    and, one place earlier, `complaint`.
    """
    scores = torch.zeros(len(prompts), len(answers[0]), dtype=torch.float64)
    jobs = [(row, lead) for row, given in enumerate(answers) for lead in _leads(given)]
    done: set[tuple[int, int]] = set()
    for chosen in batches([len(prompts[r]) + len(lead) for r, lead in jobs], batch_size, title, on_event):
        rows = [prompts[jobs[j][0]] + jobs[j][1] for j in chosen]
        ids = pad(rows, pad_id).to(model.device)
        mask = pad([[1] * len(row) for row in rows], 0).to(model.device)
        # only the logits from the shortest prompt's end on are needed; the output head is a large part of a small model
        first = min(len(prompts[jobs[j][0]]) for j in chosen) - 1
        extra = {"logits_to_keep": ids.shape[1] - first} if takes(model, "logits_to_keep") else {}
        logits = model(input_ids=ids, attention_mask=mask, **extra).logits
        shift = logits.shape[1] - ids.shape[1]  # soft prompts lengthen the sequence, logits_to_keep shortens it
        for at, j in enumerate(chosen):
            row, lead = jobs[j]
            start = len(prompts[row]) - 1 + shift
            logp = logits[at, start : start + len(lead) + 1].float().log_softmax(-1).cpu()
            for k, answer in enumerate(answers[row]):
                if answer[:-1] == lead[: len(answer) - 1] and (row, k) not in done:
                    done.add((row, k))
                    scores[row, k] = sum(logp[i, token] for i, token in enumerate(answer))
    return scores


@torch.no_grad()
def seq2seq(
    model: Model,
    prompts: list[list[int]],
    answers: list[list[list[int]]],
    pad_id: int,
    batch_size: int = 16,
    title: str = "scoring",
    on_event: OnEvent = ignore,
) -> Tensor:
    """Log-probabilities `[row, answer]` under an encoder-decoder, whose decoder reads the answer."""
    scores = torch.zeros(len(prompts), len(answers[0]), dtype=torch.float64)
    jobs = [(row, k) for row, given in enumerate(answers) for k in range(len(given))]
    for chosen in batches([len(prompts[r]) for r, _ in jobs], batch_size, title, on_event):
        rows = [prompts[jobs[j][0]] for j in chosen]
        targets = [answers[jobs[j][0]][jobs[j][1]] for j in chosen]
        logits = model(
            input_ids=pad(rows, pad_id).to(model.device),
            attention_mask=pad([[1] * len(row) for row in rows], 0).to(model.device),
            labels=pad(targets, -100).to(model.device),
        ).logits
        logp = logits.float().log_softmax(-1).cpu()
        for at, j in enumerate(chosen):
            scores[jobs[j]] = sum(logp[at, i, token] for i, token in enumerate(targets[at]))
    return scores


def _leads(answers: list[list[int]]) -> list[list[int]]:
    """The shortest list of token sequences whose forwards score every answer: no one begins another."""
    leads = sorted({tuple(a[:-1]) for a in answers}, key=len, reverse=True)
    kept: list[tuple[int, ...]] = []
    for lead in leads:
        if not any(k[: len(lead)] == lead for k in kept):
            kept.append(lead)
    return [list(k) for k in kept]
