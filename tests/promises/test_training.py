"""Promises about training: 7 (which adapter trains), 10 (seeds), 11 (resuming), 14 (checkpointing), 36 (prompts)."""

from __future__ import annotations

import warnings

import pytest
import torch

from peft import PeftModel, get_peft_model
from peft.core.adapted.layer import adapted_layers
from tests.promises.models import PROMPTS, TOKENS, adapted, call, llama, logits, lora, prompted, same


def test_promise_7_active_and_trainable_are_told_apart():
    model = adapted(names=("a", "b"))

    def training() -> set[str]:
        return {n for n in ("a", "b") if any(p.requires_grad for p in model.adapter_parameters(n))}

    assert model.active_adapters == ["a"] and training() == {"a"}
    model.set_adapter("b")
    assert model.active_adapters == ["b"] and training() == {"b"}
    model.base_model.set_adapter(["a", "b"], inference_mode=True)
    assert training() == set()
    model.set_requires_grad("a")
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    moved = {n for n in ("a", "b") if any(p.grad is not None for p in model.adapter_parameters(n))}
    assert moved == {"a"}, "both act, one trains"
    own = {id(p) for n in ("a", "b") for p in model.adapter_parameters(n)}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


def test_promise_7_a_loaded_or_added_adapter_leaves_the_training_one_alone(tmp_path):
    model = adapted(names=("a",))
    model.save_pretrained(tmp_path)
    model.add_adapter("b", lora())
    model.load_adapter(tmp_path / "a", "c")
    assert model.active_adapters == ["a"]
    assert all(p.requires_grad for p in model.adapter_parameters("a"))
    assert not any(p.requires_grad for n in ("b", "c") for p in model.adapter_parameters(n))
    assert not any(p.requires_grad for p in PeftModel.from_pretrained(llama(), tmp_path / "a").parameters())


def values(model: PeftModel, name: str = "default") -> dict[str, torch.Tensor]:
    return {
        f"{s}.{a}": p.detach().clone() for s, m in model.roster.adapters[name].methods for a, p in m.named_parameters()
    }


def test_promise_10_a_seed_gives_each_site_its_own_draws_whatever_else_happens():
    start = {"init_lora_weights": "gaussian", "seed": 7}
    model = get_peft_model(llama(), lora(**start))
    first = values(model)
    torch.manual_seed(123)
    torch.rand(17)
    fewer = values(get_peft_model(llama(), lora(**start, target_modules=["v_proj"], layers_to_transform=[1])))
    assert fewer and all(torch.equal(v, first[k]) for k, v in fewer.items())
    more = get_peft_model(llama(), lora(**start, target_modules=["up_proj", "v_proj", "q_proj", "lm_head"]))
    assert all(torch.equal(values(more)[k], v) for k, v in first.items())
    half = values(get_peft_model(llama().to(torch.bfloat16), lora(**start)))
    assert all(torch.equal(half[k], v) for k, v in first.items()), "the base's dtype is no part of the draw"
    model.add_adapter("again", lora(**start))
    assert same(values(model, "again"), first)
    sites = [v for k, v in first.items() if k.endswith("lora_A_weight")]
    assert not torch.equal(sites[0], sites[1])
    assert not same(values(get_peft_model(llama(), lora(**{**start, "seed": 8}))), first)


def test_promise_10_without_a_seed_one_number_is_drawn_from_torchs_generator():
    base, deeper = llama(), llama(4)
    torch.manual_seed(5)
    torch.randint(2**31, (1,))
    after = torch.get_rng_state()
    torch.manual_seed(5)
    one = values(get_peft_model(base, lora()))
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(5)
    assert same(values(get_peft_model(deeper, lora(layers_to_transform=[0, 1]))), one)
    assert not same(values(get_peft_model(llama(), lora())), one)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = torch.randint(0, 64, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def test_promise_11_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    def train(folder, resume=False, callbacks=()):
        torch.manual_seed(0)
        model = get_peft_model(llama(), lora(lora_dropout=0.1, modules_to_save=["lm_head"]))
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=6,
            per_device_train_batch_size=4,
            save_steps=3,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=1,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=resume)
        return model, trainer

    whole, _ = train(tmp_path / "whole")
    stopped, _ = train(tmp_path / "parts", callbacks=[Stop()])
    assert not same(values(stopped), values(whole))
    resumed, trainer = train(tmp_path / "parts", resume=True)
    assert trainer.state.global_step == 6
    assert same(values(resumed), values(whole))
    assert len(list(adapted_layers(resumed))) == len(list(adapted_layers(whole))), "nothing is wrapped twice"


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("order", ["before", "after", "before, through the wrapper", "twice"])
def test_promise_14_checkpointing_gives_the_same_gradients_in_any_order_of_set_up(order, reentrant):
    how = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}

    def run(order: str) -> dict[str, torch.Tensor]:
        base = llama()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if order in ("before", "twice"):
                base.gradient_checkpointing_enable(**how)
            model = adapted(base=base)
            if order in ("after", "twice"):
                base.gradient_checkpointing_enable(**how)
            if order.endswith("wrapper"):
                model.gradient_checkpointing_enable(**how)
        if order:
            model.prepare_model_for_gradient_checkpointing(base)
            assert all(m.gradient_checkpointing for m in base.modules() if hasattr(m, "gradient_checkpointing"))
        model.train()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        return gradients(model)

    plain = run("")
    found = run(order)
    assert plain.keys() == found.keys() and all(torch.allclose(v, found[k], atol=1e-7) for k, v in plain.items())


@pytest.mark.parametrize("order", ["before", "after"])
def test_promise_14_switching_between_forward_and_backward_does_not_change_the_gradients(order):
    def run(checkpointing: bool) -> dict[str, torch.Tensor]:
        base = llama()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if checkpointing and order == "before":
                base.gradient_checkpointing_enable()
            model = adapted(names=("a", "b"), base=base)
            if checkpointing and order == "after":
                base.gradient_checkpointing_enable()
        model.train()
        model.set_requires_grad(["a", "b"])
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        model.roster.activate(["b"])
        loss.backward()
        return gradients(model)

    plain, found = run(False), run(True)
    assert plain and plain.keys() == found.keys()
    assert all(torch.allclose(v, found[k], atol=1e-7) for k, v in plain.items())


@pytest.mark.parametrize(("cls", "config"), PROMPTS)
def test_promise_36_prompts_train_on_after_a_reload(cls, config, tmp_path):
    model = prompted(cls, config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).eval()
    with torch.no_grad():
        out = call(model).logits
        assert torch.equal(call(loaded).logits, out)
        assert not torch.allclose(out[:, -6:], logits(llama()), atol=1e-4)
    loaded.train()
    call(loaded, labels=TOKENS).loss.backward()
    moved = [p for p in loaded.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert moved and all(p.requires_grad for p in moved)
    before = [p.detach().clone() for p in moved]
    torch.optim.SGD(moved, 0.1).step()
    loaded.save_pretrained(tmp_path / "more")
    again = PeftModel.from_pretrained(llama(), tmp_path / "more").eval()
    with torch.no_grad():
        assert not any(torch.equal(a, b) for a, b in zip(moved, before))
        assert torch.allclose(call(again).logits, call(loaded.eval()).logits, atol=1e-6)
