"""The promises, by number: what users of such libraries suffer, and what may not happen here.

Each test fails without the property it names. Those about one layer alone (2, 13, 15, 18, 32, 33) are among the laws.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import sys
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import peft
from peft import (
    CheckpointError,
    LoraConfig,
    NoMatchingPeftModuleError,
    PeftConfig,
    PeftModel,
    Refusal,
    get_peft_model,
    registry,
)
from peft.core.adapted.layer import Adapted, adapted_layers
from peft.core.load import hotswap
from tests.helpers.cells import Cell, randomise, refusal

TOKENS = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(0))


def llama(layers: int = 2, seed: int = 0, **more) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(**{**sizes, "num_key_value_heads": 2, "num_hidden_layers": layers, **more})
    ).eval()


def lora(**more) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **more}
    )


def adapted(seed: int = 1, names: tuple[str, ...] = ("default",), base=None, **more) -> PeftModel:
    """A tiny Llama with adapters that have an effect."""
    torch.manual_seed(seed)
    model = get_peft_model(base if base is not None else llama(), lora(**more), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora(**more))
    for i, name in enumerate(names):
        randomise(model, name, seed + i)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, **more) -> torch.Tensor:
    return model(input_ids=TOKENS, **more).logits


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def linear_cells() -> list[Cell]:
    """Every method's every example on a plain linear layer."""
    found = [
        Cell(name, dict(config), "linear", "sequence")
        for name, m in registry.methods().items()
        if m.form != "prompt"
        for config in m.examples
    ]
    return [c for c in found if refusal(c) is None]


CELLS = linear_cells()
each_method = pytest.mark.parametrize("cell", CELLS, ids=[c.id for c in CELLS])


# -- results ----------------------------------------------------------------------------------------------------------------
def rename_keys(folder, old: str, new: str) -> None:
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as f:
        header = f.metadata()
    save_file({k.replace(old, new): v for k, v in load_file(path).items()}, path, metadata=header)


def test_promise_1_a_file_whose_keys_do_not_land_is_refused_with_both_sides(tmp_path):
    adapted().save_pretrained(tmp_path)
    rename_keys(tmp_path, "layers.1.self_attn.q_proj", "layers.1.self_attn.wq_proj")
    base = llama()
    before, expected = state(base), logits(base)
    with pytest.raises(CheckpointError) as e:
        PeftModel.from_pretrained(base, tmp_path)
    text = str(e.value)
    assert "layers.1.self_attn.q_proj.lora_A.weight" in text and "layers.1.self_attn.wq_proj.lora_A.weight" in text
    assert "Did you mean" in text
    assert same(state(base), before) and torch.equal(logits(base), expected)
    assert not any(isinstance(m, Adapted) for m in base.modules())


def test_promise_1_every_tensor_of_the_adapter_must_be_filled(tmp_path):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="not in the file"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_promise_1_a_loaded_adapter_gives_what_the_saved_one_gave(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    base = llama()
    plain = logits(base)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(loaded), plain)


def test_promise_3_a_thousand_merges_in_bf16_leave_the_same_bits():
    model = adapted(base=llama(1).to(torch.bfloat16))
    before = state(model)
    out = logits(model)
    for _ in range(1000):
        model.base_model.merge_adapter()
        model.base_model.unmerge_adapter()
    assert same(state(model), before) and torch.equal(logits(model), out)
    model.base_model.merge_adapter()
    assert not same(state(model), before)


def test_promise_4_an_export_that_differs_from_the_live_model_is_not_kept(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from peft.cli import adapters, models
    from peft.cli.console import UserError
    from peft.cli.merge import merge

    class Tokenizer:
        def __call__(self, text):
            return SimpleNamespace(input_ids=TOKENS[0].tolist())

        def save_pretrained(self, folder):
            pass

    class Task:
        auto = LlamaForCausalLM
        tokenizer = Tokenizer()

    monkeypatch.setattr(adapters, "open_adapter", lambda path: None)
    monkeypatch.setattr(adapters, "load", lambda saved, **_: SimpleNamespace(model=adapted(), task=Task(), source=None))
    broken = False

    def load_base(source, auto, dtype, **_):
        again = LlamaForCausalLM.from_pretrained(source.path)
        if broken:  # what is on disk is not what was live
            again.model.layers[0].self_attn.q_proj.weight.data += 0.5
        return again

    monkeypatch.setattr(models, "load_base", load_base)
    run = getattr(merge, "__wrapped__", merge)
    run("x", tmp_path / "good")
    assert (tmp_path / "good" / "config.json").is_file()
    broken = True
    with pytest.raises((UserError, SystemExit)):
        run("x", tmp_path / "bad")
    assert not (tmp_path / "bad").exists() and not list(tmp_path.glob("bad*"))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_promise_5_merging_into_tied_embeddings_changes_one_end_only(target, tmp_path):
    base = llama(tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = adapted(base=base, target_modules=[target])
    out = logits(model)
    merged = model.merge_and_unload().eval()
    assert torch.allclose(logits(merged), out, atol=1e-5)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    assert torch.allclose(logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), out, atol=1e-5)


def test_promise_5_tied_weights_stay_tied_where_the_merge_does_not_touch_them():
    model = adapted(base=llama(tie_word_embeddings=True))
    model.base_model.merge_adapter()
    base = model.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight and base.config.tie_word_embeddings
    model.base_model.unmerge_adapter()
    model = adapted(base=llama(tie_word_embeddings=True), target_modules=["embed_tokens"])
    before = state(model)
    model.base_model.merge_adapter()
    model.base_model.unmerge_adapter()
    base = model.get_base_model()
    assert same(state(model), before) and base.config.tie_word_embeddings
    assert base.lm_head.weight is base.get_input_embeddings().weight


HEADS = {
    "SEQ_CLS": (AutoModelForSequenceClassification, "classifier"),
    "TOKEN_CLS": (AutoModelForTokenClassification, "classifier"),
    "QUESTION_ANS": (AutoModelForQuestionAnswering, "qa_outputs"),
}


@pytest.mark.parametrize("task", HEADS)
def test_promise_6_new_heads_train_and_are_restored(task, tmp_path):
    auto, head = HEADS[task]
    config = BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=2
    )
    torch.manual_seed(0)
    body = auto.from_config(config).state_dict()

    def base(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = auto.from_config(config)
        model.load_state_dict({k: v for k, v in body.items() if head not in k}, strict=False)
        return model.eval()

    def out(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            found = model(input_ids=TOKENS)
            return found.start_logits if task == "QUESTION_ANS" else found.logits

    model = get_peft_model(base(1), LoraConfig(task_type=task, target_modules=["query"]))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any(head in n for n in trained)
    randomise(model, "default", 2)
    model.eval().save_pretrained(tmp_path)
    fresh = base(3)
    assert not torch.allclose(out(fresh), out(model), atol=1e-2)
    assert torch.equal(out(PeftModel.from_pretrained(fresh, tmp_path).eval()), out(model))


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


def test_promise_8_the_default_combination_is_the_sum_of_the_deltas():
    model = adapted(names=("a", "b"))
    randomise(model, "b", 9)
    weights = {"a": 0.3, "b": -1.7}
    model.add_weighted_adapter(["a", "b"], list(weights.values()), "sum")
    deltas = {n: dict(model.roster.adapters[n].methods) for n in ("a", "b", "sum")}
    for stem, m in deltas["sum"].items():
        expected = sum(w * deltas[n][stem].dense().double() for n, w in weights.items())
        assert torch.allclose(m.dense().double(), expected, atol=1e-6)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "one")
    model.base_model.set_adapter(["a", "b"])
    together = logits(model)
    model.set_adapter("one")
    assert torch.allclose(logits(model), together, atol=1e-5)


def test_promise_9_every_pattern_must_match_and_errors_name_what_is_near():
    base = llama()
    for config, near in (
        (lora(target_modules=["q_proj", "v_porj"]), "'v_proj'"),
        (lora(exclude_modules=["v_prj"]), "'v_proj'"),
        (lora(modules_to_save=["lm_haed"]), "'lm_head'"),
        (lora(target_modules=None, target_parameters=["q_proj.wieght"]), "q_proj.weight"),
    ):
        with pytest.raises(NoMatchingPeftModuleError) as e:
            get_peft_model(base, config)
        assert "Did you mean" in str(e.value) and near in str(e.value)
    with pytest.raises(NoMatchingPeftModuleError, match="leave none"):
        get_peft_model(base, lora(layers_to_transform=[7]))
    assert not any(isinstance(m, Adapted) for m in base.modules())


def test_promise_9_all_linear_leaves_the_heads_alone():
    rows = peft.dry_run(llama(), lora(target_modules="all-linear"))
    assert {r.path.rsplit(".", 1)[-1] for r in rows} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    bert = AutoModelForSequenceClassification.from_config(
        BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    )
    rows = peft.dry_run(bert, LoraConfig(target_modules="all-linear"))
    assert rows and not any("classifier" in r.path for r in rows)


def test_promise_9_a_dry_run_shows_what_would_be_adapted_and_changes_nothing():
    base = llama()
    before, draws = state(base), torch.get_rng_state()
    rows = peft.dry_run(base, lora())
    assert [(r.path, r.kind.name, r.shape, r.parameters) for r in rows][:2] == [
        ("model.layers.0.self_attn.q_proj", "linear", (16, 16), 4 * 32),
        ("model.layers.0.self_attn.v_proj", "linear", (16, 16), 4 * 32),
    ]
    assert same(state(base), before) and torch.equal(torch.get_rng_state(), draws)
    model = get_peft_model(base, lora())
    assert sum(r.parameters for r in rows) == model.get_nb_trainable_parameters()[0]


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
    sites = [v for k, v in first.items() if k.endswith("lora_A")]
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


# -- 12: hot swap -------------------------------------------------------------------------------------------------------------
@each_method
def test_promise_12_a_swap_equals_a_fresh_load(cell, tmp_path):
    model, inputs = cell.model()
    randomise(model, "default", 11)
    model.save_pretrained(tmp_path)
    other, _ = cell.model()
    with torch.no_grad():
        base, _ = cell.base()
        fresh = PeftModel.from_pretrained(base, tmp_path).eval()(*inputs)
        assert not torch.equal(other(*inputs), fresh)
        hotswap.hotswap_adapter(other, str(tmp_path), "default")
        assert torch.equal(other(*inputs), fresh)


@pytest.mark.parametrize("call", ["hotswap", "load_adapter"])
@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": 32},
        {"r": 6},
        {"use_rslora": True},
        {"target_modules": ["v_proj", "up_proj"]},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"layers.0": 1}},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda c: next(iter(c)),
)
def test_promise_12_scale_rank_and_targets_are_swapped_too(change, call, tmp_path):
    adapted(seed=5, **change).save_pretrained(tmp_path)
    expected = logits(PeftModel.from_pretrained(llama(), tmp_path).eval())
    model = adapted(seed=1, names=("default", "other"))
    model.set_adapter("other")
    other = logits(model)
    model.set_adapter("default")
    if call == "hotswap":
        hotswap.hotswap_adapter(model, str(tmp_path), "default")
    else:
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model.eval()), expected)
    assert model.active_adapters == ["default"] and all(p.requires_grad for p in model.adapter_parameters("default"))
    model.set_adapter("other")
    assert torch.equal(logits(model), other)


def test_promise_12_a_swap_that_does_not_fit_touches_nothing(tmp_path):
    adapted(seed=5).save_pretrained(tmp_path / "good")
    rename_keys(tmp_path / "good", "layers.1.self_attn.v_proj", "layers.1.self_attn.x_proj")
    other = next(c for c in registry.methods().values() if c.form == "after" and c.peft_type)
    get_peft_model(llama(), other.config_class(target_modules=["v_proj"], **other.examples[0])).save_pretrained(
        tmp_path / "method"
    )
    model = adapted()
    before, out = state(model), logits(model)
    for folder, error in (("good", CheckpointError), ("method", ValueError)):
        with pytest.raises(error):
            hotswap.hotswap_adapter(model, str(tmp_path / folder), "default")
        assert same(state(model), before) and torch.equal(logits(model), out)
    model.base_model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        hotswap.hotswap_adapter(model, str(tmp_path / "good"), "default")


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.v_proj(torch.tanh(self.q_proj(x)))


def test_promise_12_twenty_swaps_into_padded_slots_recompile_nothing(tmp_path):
    x = torch.randn(3, 16)

    def saved(name, **more):
        model = adapted(base=Two().eval(), task_type=None, **more)
        model.save_pretrained(tmp_path / name)
        return model(x).detach()

    expected = []
    for i in range(20):
        more = {"r": 1 + i % 7, "lora_alpha": 3 + i, "use_rslora": i % 3 == 0}
        if i % 5 == 4:
            more["target_modules"] = ["v_proj"]
        expected.append(saved(str(i), seed=i, **more))
    saved("big", r=9)

    def compiled(prepare: bool):
        model = PeftModel.from_pretrained(Two().eval(), tmp_path / "3").eval()
        if prepare:
            hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
        assert torch.allclose(model(x), expected[3], atol=1e-6)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            compiled(x)
        return model, compiled

    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        model, run = compiled(prepare=False)
        hotswap.hotswap_adapter(run, str(tmp_path / "2"), "default")
        with pytest.raises(Exception, match="[Rr]ecompil"):
            run(x)
        model, run = compiled(prepare=True)
        for i in range(20):
            hotswap.hotswap_adapter(run, str(tmp_path / str(i)), "default")
            assert torch.allclose(run(x), expected[i], atol=1e-4), i
    before = state(model)
    with pytest.raises(ValueError, match="rank 9"):
        hotswap.hotswap_adapter(run, str(tmp_path / "big"), "default")
    assert same(state(model), before)
    with pytest.raises(ValueError, match="before compiling"):
        hotswap.prepare_model_for_compiled_hotswap(run, target_rank=8)


# -- 14: gradient checkpointing -------------------------------------------------------------------------------------------------
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


# -- loading, saving, security ----------------------------------------------------------------------------------------------------
def test_promise_21_local_files_need_no_network(tmp_path, monkeypatch):
    def blocked(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    with pytest.raises(AssertionError):
        socket.create_connection(("localhost", 9))
    base = llama()
    base.config._name_or_path = base.name_or_path = "nobody/no-such-model"
    model = adapted(base=base, names=("default", "b"))
    model.save_pretrained(tmp_path, model_card=True)
    PeftConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    loaded.load_adapter(tmp_path / "b", "b")
    peft.load_peft_weights(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_promise_22_pickled_weights_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = adapted()
    model.save_pretrained(tmp_path / "good", safe_serialization=False)
    assert (tmp_path / "good" / "adapter_model.bin").is_file()
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "good").eval()), logits(model))
    torch.save({"base_model.model.x": Evil()}, tmp_path / "good" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="plain tensors"):
        PeftModel.from_pretrained(llama(), tmp_path / "good")
    assert not (tmp_path / "owned").exists()


def test_promise_22_no_config_names_a_class_or_a_path_to_import(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "evil_package", None)
    model = adapted(task_type=None)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config.update(
        base_model_name_or_path="x", auto_mapping={"parent_library": "evil_package", "base_model_class": "Model"}
    )
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="evil_package"):
        peft.AutoPeftModel.from_pretrained(tmp_path)
    config.update(peft_type="os.system")
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Unknown method"):
        PeftConfig.from_pretrained(tmp_path)


def test_promise_22_no_path_escapes_the_folder(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "secret")
    (tmp_path / "open").mkdir()
    for call in (
        lambda: PeftModel.from_pretrained(llama(), tmp_path / "open", subfolder="../secret"),
        lambda: PeftConfig.from_pretrained(tmp_path / "open", subfolder="../secret"),
    ):
        with pytest.raises(ValueError, match="out of"):
            call()
    os.symlink(tmp_path / "secret", tmp_path / "open" / "link")
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(llama(), tmp_path / "open", subfolder="link")
    for name in ("../x", "a/b", "..", "", "a\\b", "x\0"):
        with pytest.raises(ValueError, match="folder"):
            model.add_adapter(name, lora())


@pytest.mark.parametrize("crash_at", [1, 2])
def test_promise_23_a_crash_while_saving_leaves_the_old_adapter_or_the_new(crash_at, tmp_path, monkeypatch):
    old, new = adapted(seed=1), adapted(seed=2, lora_alpha=64, r=2)
    old.save_pretrained(tmp_path)
    renames = []
    replace = os.replace

    def crash(a, b):
        renames.append(b)
        if len(renames) == crash_at:
            raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert len(renames) == crash_at
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    expected = old if crash_at == 1 else new
    assert torch.equal(logits(loaded), logits(expected)) and not torch.equal(logits(old), logits(new))
    assert crash_at == 1 or any("disagrees" in str(w.message) and "lora_alpha" in str(w.message) for w in seen)


def test_promise_24_a_field_that_is_not_built_is_refused_by_name_unless_it_is_at_its_default(tmp_path):
    found = 0
    for method in registry.methods().values():
        cls, needed = method.config_class, method.examples[0] if method.examples else {}
        for name, f in cls.__dataclass_fields__.items():
            if "unavailable" in f.metadata:
                found += 1
                with pytest.raises(ValueError, match=name):
                    cls(**{**needed, name: "something"})
                default = f.metadata["unavailable"]
                assert getattr(cls(**{**needed, name: copy.deepcopy(default)}), name) == default
    assert found


def test_promise_24_an_unknown_field_warns_by_name_and_strict_refuses(tmp_path):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "lora_alpa": 99, "from_the_future": 1}))
    with pytest.warns(UserWarning, match=r"lora_alpa.*from_the_future.*lora_alpha"):
        assert PeftConfig.from_pretrained(tmp_path).lora_alpha == 8
    with pytest.raises(ValueError, match="from_the_future"):
        PeftConfig.from_pretrained(tmp_path, strict=True)


def test_promise_25_the_wrong_base_is_told_by_what_differs(tmp_path):
    adapted().save_pretrained(tmp_path)

    class OtherForCausalLM(LlamaForCausalLM):
        pass

    wider = llama(hidden_size=32)
    larger = llama(vocab_size=80)
    other = OtherForCausalLM(llama().config)
    for base, names in (
        (other, ("OtherForCausalLM", "LlamaForCausalLM")),
        (larger, ("64", "80")),
        (wider, ("q_proj", "16", "32")),
    ):
        before = state(base)
        with pytest.raises(CheckpointError) as e:
            PeftModel.from_pretrained(base, tmp_path)
        assert all(n in str(e.value) for n in names), str(e.value)
        assert same(state(base), before)
    with pytest.raises(NoMatchingPeftModuleError):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(16, 16)), tmp_path)
    PeftModel.from_pretrained(larger, tmp_path, strict=False)


def calls(run) -> int:
    """How many Python functions `run` calls."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def test_promise_26_adding_an_adapter_costs_the_same_however_many_there_are(tmp_path):
    model = adapted(names=("default", "b"))
    model.save_pretrained(tmp_path)
    add = [calls(lambda i=i: model.add_adapter(f"a{i}", lora())) for i in range(12)]
    load = [calls(lambda i=i: model.load_adapter(tmp_path, f"l{i}")) for i in range(12)]
    assert add[-1] < 1.1 * add[1] and load[-1] < 1.1 * load[1], (add, load)


def test_promise_26_adding_costs_in_proportion_to_the_model():
    few, many = ({n: calls(lambda n=n: get_peft_model(llama(n), lora()))} for n in (4, 16))
    base = {n: calls(lambda n=n: llama(n)) for n in (4, 16)}
    assert many[16] - base[16] < 5 * (few[4] - base[4])


def test_promise_26_switching_visits_no_modules():
    models = {n: adapted(base=llama(n), names=("a", "b")) for n in (1, 8)}
    cost = {n: calls(lambda n=n: models[n].roster.activate(["b"])) for n in models}
    assert cost[1] == cost[8]


def test_switching_goes_on_where_a_wrapper_took_parameters_out_of_their_modules():
    """FSDP's flat parameters leave the modules without their own; switching then concerns those that are left."""
    model = adapted(names=("a", "b"))
    model.set_adapter("b")
    (_, method), *rest = model.roster.adapters["a"].methods
    del method._parameters["lora_A"]
    model.set_adapter("a")
    assert method.lora_B.requires_grad and all(m.lora_A.requires_grad for _, m in rest)
    model.set_adapter("b")
    assert not method.lora_B.requires_grad and not any(m.lora_A.requires_grad for _, m in rest)


# -- what upstream's matrix misses ------------------------------------------------------------------------------------------------
NAMES = [
    "0",
    "q_proj",
    "train",
    "v1.0",
    "lora_A",
    "base_layer",
    "default",
    "adapters",
    "forward",
    "a b",
    "ä%",
    "weight",
    "eval",
]


def test_promise_30_any_name_that_a_folder_may_have_works(tmp_path):
    model = adapted(names=tuple(NAMES))
    for name in NAMES:
        randomise(model, name, hash(name) % 1000)
    out = {}
    for name in NAMES:
        model.set_adapter(name)
        out[name] = logits(model)
    assert len({tuple(v.flatten().tolist()) for v in out.values()}) == len(NAMES)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "0", adapter_name="0")
    for name in NAMES[1:]:
        loaded.load_adapter(tmp_path if name == "default" else tmp_path / name, name)
    for name in NAMES:
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded.eval()), out[name]), name
        file = load_file((tmp_path if name == "default" else tmp_path / name) / "adapter_model.safetensors")
        assert set(file) == {
            f"base_model.model.model.layers.{i}.self_attn.{p}_proj.lora_{x}.weight"
            for i in (0, 1)
            for p in "qv"
            for x in "AB"
        }
    for name in NAMES[:-1]:
        loaded.delete_adapter(name)
    assert torch.equal(logits(loaded), out[NAMES[-1]])


@each_method
def test_promise_31_rows_and_several_active_adapters_for_every_method(cell):
    model, inputs = cell.model(names=("default", "b"))
    with torch.no_grad():
        alone = {}
        for name in ("default", "b"):
            model.set_adapter(name)
            alone[name] = model(*inputs)
        names = ["b", "default", "__base__", "b"]
        mixed = model(*inputs, adapter_names=names)
        with model.disable_adapter():
            alone["__base__"] = model(*inputs)
        for i, name in enumerate(names):
            assert torch.allclose(mixed[i], alone[name][i], atol=1e-5)
        model.base_model.set_adapter(["default", "b"])
        both = model(*inputs)
        assert not torch.equal(both, alone["default"]) and not torch.equal(both, alone["b"])
        try:
            model.base_model.merge_adapter()
        except Refusal:
            return
        assert torch.allclose(model(*inputs), both, atol=cell.tolerance * max(1.0, float(both.abs().max())))


@each_method
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_promise_34_nan_and_inf_are_found_before_anything_is_written(cell, poison):
    model, _ = cell.model()
    before = {n: p.clone() for n, p in model.get_base_model().named_parameters()}
    if not all(m.mergeable for _, m in model.roster.adapters["default"].methods):
        with pytest.raises(Refusal):
            model.base_model.merge_adapter()
        return
    tensors = [p for p in model.adapter_parameters("default") if p.is_floating_point()]
    with torch.no_grad():
        tensors[-1].view(-1)[0] = poison
    for run in (model.base_model.merge_adapter, model.base_model.merge_and_unload):
        with pytest.raises(ValueError, match="NaN or inf"):
            run()
        after = dict(model.get_base_model().named_parameters())
        own = {id(p) for p in model.adapter_parameters("default")}
        assert all(torch.equal(after[n], v) for n, v in before.items() if id(after[n]) not in own)
        assert not any(layer.merged for layer in adapted_layers(model))


def test_promise_34_a_merge_that_overflows_the_bases_dtype_is_found():
    model = adapted(base=llama(1).to(torch.float16))
    with torch.no_grad():
        for stem, m in model.roster.adapters["default"].methods:
            if stem.endswith("v_proj"):
                m.lora_A.fill_(500)
                m.lora_B.fill_(500)
    before = state(model)
    with pytest.raises(ValueError, match="NaN or inf"):
        model.base_model.merge_adapter()
    assert same(state(model), before) and not any(layer.merged for layer in adapted_layers(model))


@each_method
def test_promise_35_disable_delete_and_unload_give_back_the_base(cell):
    def fresh():
        return cell.model(names=("default", "b"))

    base, inputs = cell.base()
    with torch.no_grad():
        expected = base(*inputs)
        model, _ = fresh()
        grads = [p.requires_grad for p in model.parameters()]
        with model.disable_adapter():
            assert torch.equal(model(*inputs), expected)
        assert [p.requires_grad for p in model.parameters()] == grads
        model.delete_adapter("default")
        assert model.active_adapters == ["b"]
        model.delete_adapter("b")
        assert torch.equal(model(*inputs), expected)
        model, _ = fresh()
        back = model.unload()
        assert torch.equal(back(*inputs), expected)
        assert same(state(back), state(base)) and [type(m) for m in back.modules()] == [type(m) for m in base.modules()]


def test_promise_35_disable_unmerges_and_merges_again_and_survives_errors():
    model = adapted()
    base = logits(llama())
    out = logits(model)
    model.base_model.merge_adapter()
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        assert torch.equal(logits(model), base)
        raise ZeroDivisionError
    assert torch.allclose(logits(model), out, atol=1e-5) and all(layer.merged for layer in adapted_layers(model))
    assert model.roster.enabled


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_promise_35_starts_from_the_weight_leave_the_weight_alone(start):
    base = llama()
    before = state(base)
    model = get_peft_model(base, lora(init_lora_weights=start))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    assert same(state(model.unload()), before)


# -- prompts, as any other method -------------------------------------------------------------------------------------------------
PROMPTS = [
    pytest.param(m.config_class, dict(config), id=f"{name}-{i}")
    for name, m in registry.methods().items()
    if m.form == "prompt"
    for i, config in enumerate(m.examples)
]


def prompted(cls, config) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(llama(), cls(**{"task_type": "CAUSAL_LM", **config}))
    randomise(model, "default", 2)
    return model.eval()


def call(model: PeftModel, **more):
    needed = (
        {"task_ids": torch.zeros(2, dtype=torch.long)} if hasattr(model.peft_config["default"], "num_tasks") else {}
    )
    return model(input_ids=TOKENS, **needed, **more)


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


@pytest.mark.parametrize(("cls", "config"), PROMPTS)
def test_promise_35_prompts_are_disabled_deleted_and_unloaded(cls, config):
    expected = logits(llama())
    model = prompted(cls, config)
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(call(model).logits, expected)
        model.add_adapter("b", lora())
        model.delete_adapter("default")
        assert torch.equal(logits(model), expected), "a fresh LoRA is the identity"
        back = prompted(cls, config).base_model.unload()
        assert torch.equal(logits(back), expected) and same(state(back), state(llama()))


def test_promise_20_only_the_trained_rows_of_an_embedding_are_saved(tmp_path):
    rows = [3, 60]
    model = adapted(trainable_token_indices=rows)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    embeddings = {k: v for k, v in tensors.items() if "embed_tokens" in k}
    assert embeddings and all(v.shape[0] == len(rows) for v in embeddings.values())
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), logits(model))
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as f:
        assert json.loads(f.metadata()["peft_base"])["vocab_size"] == 64


def test_promise_20_whole_embeddings_are_saved_when_asked_for_and_their_size_is_told(tmp_path, capsys):
    model = adapted()
    model.save_pretrained(tmp_path / "no")
    assert not any("embed" in k for k in load_file(tmp_path / "no" / "adapter_model.safetensors"))
    model.save_pretrained(tmp_path / "yes", save_embedding_layers=True)
    assert any("embed" in k for k in load_file(tmp_path / "yes" / "adapter_model.safetensors"))
    assert "MiB" in capsys.readouterr().out


def test_26_setting_an_adapter_layer_by_layer_visits_its_parameters_once(monkeypatch):
    """transformers and diffusers call `set_adapter` on every layer; the whole model must not be walked each time."""
    from peft.core.acting.roster import Roster

    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=r"\d+"))
    wrapped.add_adapter("b", LoraConfig(r=2, target_modules=r"\d+"))
    calls = []
    plain = Roster.set_trainable
    monkeypatch.setattr(Roster, "set_trainable", lambda self, *a: calls.append(a) or plain(self, *a))
    for layer in adapted_layers(wrapped):
        layer.set_adapter("b")
    assert len(calls) == 2  # "default" frozen, "b" trained
    assert wrapped.active_adapters == ["b"]
    assert all(p.requires_grad for p in wrapped.adapter_parameters("b"))
