"""The Trainer's changes: which logits are computed, and the order of batches."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

from peft.recipes.events import Event, Logged, Step, TrainingEnded
from peft.recipes.trainers import supervised as training


def test_the_loss_over_answers_only_is_the_loss(home: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "llama").eval()
    ids = torch.randint(3, 40, (3, 12))
    labels = ids.clone()
    labels[0, :9], labels[1, :7], labels[2, :10] = -100, -100, -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    short = training.answers_only(model, inputs)
    assert short["logits_to_keep"] == 6
    assert model(**short).logits.shape[1] == 6
    torch.testing.assert_close(model(**short).loss, model(**inputs).loss)
    whole = training.answers_only(model, inputs | {"labels": ids})
    torch.testing.assert_close(model(**whole).loss, model(input_ids=ids, labels=ids).loss)


def test_batches_of_like_length_depend_on_seed_and_epoch_alone() -> None:
    lengths = [random.Random(1).randint(3, 40) + i % 7 for i in range(45)]
    sampler = training.LengthGroups(lengths, 8, seed=3)
    first = list(sampler)
    torch.rand(5)
    assert first == list(sampler) and sorted(first) == list(range(45))
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_steps_and_logs_are_told() -> None:
    told: list[Event] = []
    teller, state = training.Teller(told.append), SimpleNamespace(global_step=2, max_steps=4)
    teller.on_train_begin(None, state, None)
    state.global_step = 3
    teller.on_step_end(None, state, None)
    teller.on_log(None, state, None, logs={"loss": 0.5})
    teller.on_train_end(None, state, None)
    logged = told.pop(2)
    assert told == [Step(2, 4), Step(3, 4), TrainingEnded()]
    assert isinstance(logged, Logged) and logged.numbers == {"loss": 0.5} and logged.seconds_left >= 0
    assert logged.memory["peak"] > 0
