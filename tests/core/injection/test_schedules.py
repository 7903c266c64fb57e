"""Who tells a method with a schedule of the optimiser's steps: a call by hand, the Trainer's steps, or nobody, with a warning."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import peft
from peft import AdaLoraConfig, LoraConfig, get_peft_model, inject_adapter_in_model, update_and_allocate
from peft.core.injection import schedules
from tests.helpers.tiny_llama import llama

STEPS = 6


def config(**more):
    fields = {"init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 1, "total_step": STEPS, "seed": 1}
    return AdaLoraConfig(**{**fields, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **more})


def rows():
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 60, (4 * STEPS, 8), generator=g)
    return [{"input_ids": i, "labels": i} for i in ids]


class ByHand(TrainerCallback):
    def __init__(self, event, model):
        self.model, self.said = model, []
        setattr(self, event, self.told)

    def told(self, args, state, control, **_):
        self.said.append(state.global_step + 1)
        self.model.update_and_allocate(state.global_step + 1)


def trainer(model, folder, callbacks=(), **more):
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "seed": 0}
    args = TrainingArguments(str(folder), **{**settings, "save_strategy": "no", "learning_rate": 0.05, **more})
    return Trainer(model, args, train_dataset=rows(), callbacks=list(callbacks))


def kept(model):
    return [int(m.nested()[-1].kept.sum()) for _, m in model.roster.adapters["default"].own()]


def values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def run_by_loop(model, tell=None, steps=STEPS, every=1):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.stack([r["input_ids"] for r in rows()[:4]])
    for step in range(1, steps + 1):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if tell is not None and step % every == 0:
            tell(step)
        optimizer.zero_grad()


def test_under_the_trainer_the_budget_falls_by_itself_as_with_a_callback(tmp_path):
    base = get_peft_model(llama(), config())
    trainer(base, tmp_path).train()
    assert sum(kept(base)) == len(kept(base))  # target_r = 1 on average
    assert base.peft_config["default"].rank_pattern is not None
    called = get_peft_model(llama(), config())
    by_hand = ByHand("on_optimizer_step", called)
    trainer(called, tmp_path, [by_hand]).train()
    assert by_hand.said == list(range(1, STEPS + 1))
    assert kept(called) == kept(base)
    ours, theirs = values(base), values(called)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_a_call_by_hand_takes_the_hooks_place_and_nothing_is_counted_twice(tmp_path, monkeypatch):
    told = []
    tell = schedules._tell
    monkeypatch.setattr(schedules, "_tell", lambda adapter, step: (told.append(step), tell(adapter, step))[1])
    model = get_peft_model(llama(), config(tinit=0))
    trainer(model, tmp_path, [ByHand("on_optimizer_step", model)]).train()
    assert told == [1, 1, *range(2, STEPS + 1)]  # the hook's first is taken back
    alone = get_peft_model(llama(), config(tinit=0))
    monkeypatch.setattr(schedules, "_stepped", lambda *_: None)
    schedules._watched.clear()
    trainer(alone, tmp_path, [ByHand("on_optimizer_step", alone)]).train()
    assert kept(alone) == kept(model)
    ours, theirs = values(model), values(alone)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_a_callback_before_the_step_is_by_hand_too(tmp_path, monkeypatch):
    told = []
    tell = schedules._tell
    monkeypatch.setattr(schedules, "_tell", lambda adapter, step: (told.append(step), tell(adapter, step))[1])
    model = get_peft_model(llama(), config())
    trainer(model, tmp_path, [ByHand("on_pre_optimizer_step", model)]).train()
    assert told == list(range(1, STEPS + 1))


def test_the_steps_are_the_optimizers_not_the_batches(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(schedules, "_tell", lambda adapter, step: told.append(step))
    trainer(
        get_peft_model(llama(), config()), tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2
    ).train()
    assert told == list(range(1, STEPS + 1))


def test_a_trainer_that_is_shorter_than_the_schedule_is_told(tmp_path):
    with pytest.warns(UserWarning, match=r"runs 6 steps, but .* until step 99 .*total_step=100"):
        trainer(get_peft_model(llama(), config(total_step=100)), tmp_path).train()


def test_a_loop_that_tells_nothing_is_warned_of_once(recwarn):
    model = get_peft_model(llama(), config(tinit=2))
    run_by_loop(model, steps=3)
    assert not [w for w in recwarn if "nothing tells it" in str(w.message)]
    with pytest.warns(
        UserWarning, match=r"'default' \(ADALORA\) has trained 4 steps, but .*update_and_allocate"
    ) as seen:
        run_by_loop(model, steps=5)
    assert len([w for w in seen if "nothing tells it" in str(w.message)]) == 1
    assert kept(model) == [4] * len(kept(model))


@pytest.mark.parametrize("every", [1, 2])
def test_a_loop_that_tells_each_step_is_not(every):
    model = get_peft_model(llama(), config())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run_by_loop(model, model.update_and_allocate, every=every)
        run_by_loop(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])))
    if every == 1:
        assert sum(kept(model)) == len(kept(model))


def test_an_injected_model_is_told_through_the_function():
    wrapped, plain = get_peft_model(llama(), config()), inject_adapter_in_model(config(), llama())
    run_by_loop(wrapped, wrapped.update_and_allocate)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run_by_loop(plain, lambda step: update_and_allocate(plain, step))
    kept_plain = [int(m.nested()[-1].kept.sum()) for _, m in plain._peft_roster.adapters["default"].own()]
    assert sum(kept_plain) == len(kept_plain) and peft.update_and_allocate is update_and_allocate
    with pytest.raises(ValueError, match="no adapters"):
        update_and_allocate(llama(), 1)
    with pytest.raises(ValueError, match="other"):
        update_and_allocate(plain, 1, "other")
    assert len(kept_plain) == len(kept(wrapped))


def test_nothing_holds_a_model_that_is_gone():
    model = get_peft_model(llama(), config())
    roster = schedules.weakref.ref(model.roster)
    del model
    gc.collect()
    assert roster() is None
    get_peft_model(llama(), config())
    assert all(w.roster() is not None for w in list(schedules._watched.values())[:-1])
