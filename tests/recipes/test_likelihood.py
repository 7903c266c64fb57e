"""Answers are scored by the sum of their tokens' log-probabilities."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from peft.recipes import likelihood
from peft.recipes.events import Event, Progress


def test_label_likelihood_is_the_sum_over_the_answers_tokens(home: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "llama").eval()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [4]]
    answers = [[[20], [21, 20], [21, 22, 23]], [[20], [24, 20], [25]], [[20], [20, 21], [22, 20]]]
    found = likelihood.causal(model, prompts, answers, pad_id=0, batch_size=2)
    for row, prompt in enumerate(prompts):
        for k, answer in enumerate(answers[row]):
            logp = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            right = sum(logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
            assert found[row, k].item() == pytest.approx(right, abs=1e-5)


def test_seq2seq_likelihood(home: Path) -> None:
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(home / "t5").eval()
    prompts, answers = [[5, 6, 7], [8, 9]], [[[20], [21, 20]], [[20], [21, 20]]]
    found = likelihood.seq2seq(model, prompts, answers, pad_id=0, batch_size=3)
    for row, prompt in enumerate(prompts):
        for k, answer in enumerate(answers[row]):
            logp = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).logits[0].log_softmax(-1)
            assert found[row, k].item() == pytest.approx(sum(logp[i, t].item() for i, t in enumerate(answer)), abs=1e-5)


def test_progress_is_told_batch_by_batch_longest_first() -> None:
    told: list[Event] = []
    found = list(likelihood.batches([3, 9, 5], 2, "scoring", told.append))
    assert found == [[1, 2], [0]]
    assert told == [Progress("scoring", done, 2) for done in (0, 1, 2)]
