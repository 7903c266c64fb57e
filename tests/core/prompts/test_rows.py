"""Several prompts in one model: per row, together, and switched."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel, Refusal, get_peft_model
from tests.golden.prompt import make
from tests.helpers.prompts import (
    EXAMPLES,
    METHODS,
    arguments,
    close,
    config,
    every_method,
    gradients,
    loss_of,
    on,
    prompted,
    randomise,
    run,
)

CAUSAL = [m for m, (_, task) in make.MODELS.items() if task == "CAUSAL_LM"]


def crowd(model: str) -> PeftModel:
    """Adapters of every prompt method with different numbers of tokens, and a LoRA."""
    made = None
    for i, (method, example) in enumerate(EXAMPLES):
        settings = config(method, example, model, num_virtual_tokens=1 + i % 4)
        if made is None:
            made = get_peft_model(make.build(model), settings, adapter_name="0")
        else:
            made.add_adapter(str(i), settings)
        randomise(made, str(i), 10 + i)
    made.add_adapter("lora", LoraConfig(task_type=settings.task_type, r=2, seed=6, target_modules="all-linear"))
    randomise(made, "lora", 5)
    return made.eval()


def batches(made: PeftModel, model: str) -> list[list[str]]:
    """Names that may share a batch: all of them, but for two refusals that have their own tests below."""
    names = list(made.roster.adapters)
    acting = {n: made.roster.adapters[n].methods[0][1] for n in names if made.peft_config[n].is_prompt_learning}
    if model == "gemma2":
        prefixes = [n for n, m in acting.items() if m.keyed]
        return [[*prefixes, "lora", "__base__"], [n for n in [*names, "__base__"] if n not in prefixes]]
    if model == "t5":
        names = [n for n in names if n not in acting or not acting[n].prompts_decoder]
    return [[*names, "__base__"]]


@on("model", [*CAUSAL, "t5", "bert_cls", "bert_tok"])
@on("masked", [True, False])
def test_rows_of_a_batch_are_independent(model, masked):
    made = crowd(model)
    given = make.inputs(model)
    more = {"labels": given["input_ids"][:1, :4].clip(1)} if model == "t5" else {}

    def pick(index: list[int]) -> dict:
        kept = {k: v[index] for k, v in given.items() if masked or k != "attention_mask"}
        return {**kept, **{k: v.repeat(len(index), 1) for k, v in more.items()}}

    for names in batches(made, model):
        rows = [i % 2 for i in range(len(names))]
        with torch.no_grad():
            mixed = make.main_output(made(**pick(rows), adapter_names=names))
            for i, name in enumerate(names):
                if name != "__base__":
                    made.set_adapter(name)
                with made.disable_adapter() if name == "__base__" else contextlib.nullcontext():
                    alone = make.main_output(made(**pick([rows[i]])))[0]
                first = slice(None, len(alone)) if model.startswith("bert") else slice(-len(alone), None)
                own = mixed[i][first] if alone.dim() > 1 else mixed[i]
                if masked and alone.dim() > 1 and model in CAUSAL:  # a row ends with its virtual tokens and its text
                    real = len(alone) - int((given["attention_mask"][rows[i]] == 0).sum())
                    own, alone = own[-real:], alone[-real:]
                elif masked and alone.dim() > 1 and model != "t5":  # what padding gives depends on its width
                    real = nn.functional.pad(given["attention_mask"][rows[i]], (len(alone) - 6, 0), value=1).bool()
                    own, alone = own[real], alone[real]
                assert close(own, alone, 2e-5), name


@on("model", [*CAUSAL, "t5"])
@on("beams", [1, 2])
def test_rows_generate_independently(model, beams):
    made = crowd(model)
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    for names in batches(made, model):
        if model == "t5":  # a LoRA in the encoder sees the rows before the beams are made
            names = [n for n in names if n != "lora"]
        given = {k: v[[i % 2 for i in range(len(names))]] for k, v in make.inputs(model).items()}
        mixed = made.generate(**given, **how, adapter_names=names)
        for i, name in enumerate(names):
            if name != "__base__":
                made.set_adapter(name)
            with made.disable_adapter() if name == "__base__" else contextlib.nullcontext():
                alone = made.generate(**{k: v[i : i + 1] for k, v in given.items()}, **how)
            assert torch.equal(mixed[i], alone[0]), name


def test_rows_train_their_own_adapters():
    """The gradients of a mixed batch are those of each row alone."""
    made = crowd("llama_gqa")
    names = ["0", "6", "lora", "4"]
    made.set_requires_grad(names, True)
    given = {k: v.repeat(2, 1) for k, v in make.inputs("llama_gqa").items()}

    def score(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1].square().sum()

    score(made(**given, adapter_names=names).logits).backward()
    together = gradients(made)
    made.zero_grad()
    for i, name in enumerate(names):
        score(made(**{k: v[i : i + 1] for k, v in given.items()}, adapter_names=[name]).logits).backward()
    apart = gradients(made)
    assert together.keys() == apart.keys()
    for n in apart:
        assert torch.allclose(together[n], apart[n], atol=1e-4, rtol=1e-4), n


def test_a_window_refuses_prefixes_beside_prompts():
    made = crowd("gemma2")
    prefix = next(n for n in made.roster.adapters if n != "lora" and made.roster.adapters[n].methods[0][1].keyed)
    with pytest.raises(Refusal, match="window"):
        made(**arguments("gemma2"), adapter_names=["0", prefix])


def test_decoder_rows_of_different_length_are_refused():
    made = crowd("t5")
    multitask = next(n for n, a in made.roster.adapters.items() if getattr(a.methods[0][1], "prompts_decoder", False))
    with pytest.raises(Refusal, match="before the decoder"):
        made(**arguments("t5"), adapter_names=[multitask, "0"])


@every_method
def test_it_acts_together_with_lora(method, example):
    name = "llama_gqa"
    made = prompted(method, example, name)
    alone = run(made, name)
    made.add_adapter("lora", LoraConfig(task_type="CAUSAL_LM", r=2, seed=6, target_modules="all-linear"))
    randomise(made, "lora", 5)
    made.set_adapter(["default", "lora"])
    both = run(made, name)
    lora = get_peft_model(
        make.build(name), LoraConfig(task_type="CAUSAL_LM", r=2, seed=6, target_modules="all-linear"), "lora"
    )
    randomise(lora, "lora", 5)
    merged = get_peft_model(lora.merge_and_unload(), config(method, example, name)).eval()
    randomise(merged, "default")
    assert not torch.equal(both, alone)
    assert close(both, run(merged, name), 2e-5)
    loss_of(made, name).backward()
    assert {n for n, p in made.named_parameters() if p.requires_grad} == set(gradients(made))


@every_method
def test_two_active_prompts_stand_side_by_side(method, example):
    """Two of n tokens act like one of 2n that holds both."""
    made = (
        prompted(method, example, save_encoder=False)
        if example and "save_encoder" in dir(METHODS[method].config_class)
        else prompted(method, example)
    )
    made.add_adapter("b", config(method, example, "llama_gqa"))
    randomise(made, "b", 8)
    made.set_adapter(["default", "b"])
    both = run(made, "llama_gqa")
    one = prompted(method, example, num_virtual_tokens=2 * made.peft_config["b"].num_virtual_tokens)
    parts = [made.roster.adapters[n].methods[0][1] for n in ("default", "b")]
    joint = one.roster.adapters["default"].methods[0][1]
    with torch.no_grad():
        if joint.inputs:
            rows = torch.cat([p.prompt(None).reshape(-1, make.D) for p in parts])
            joint.prompt = lambda tasks: rows
        else:
            pairs = {i: [torch.cat([p.keys_values(i)[k] for p in parts], 1) for k in (0, 1)] for i in (0, 1)}
            joint.keys_values = lambda layer: pairs[layer]
    assert close(run(one, "llama_gqa"), both)


@every_method
def test_switching_is_isolated(method, example):
    made = prompted(method, example)
    first = run(made, "llama_gqa")
    made.add_adapter("b", config(method, example, "llama_gqa", num_virtual_tokens=4))
    randomise(made, "b", 8)
    made.set_adapter("b")
    assert not torch.equal(run(made, "llama_gqa")[:, -6:], first[:, -6:])
    made.set_adapter("default")
    assert torch.equal(run(made, "llama_gqa"), first)
