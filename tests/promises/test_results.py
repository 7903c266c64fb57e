"""Promises about results: 3, 4, 5 and 34 (merging), 6 (heads), 8 (combinations), 31 (rows and several adapters)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    LlamaForCausalLM,
)

from peft import LoraConfig, PeftModel, Refusal, get_peft_model
from peft.contract.capabilities import Exclusive
from peft.core.adapted.layer import adapted_layers
from tests.helpers.cells import randomise
from tests.promises.models import TOKENS, adapted, each_method, llama, logits, same, state


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

    from peft.cli.merge import merge
    from peft.errors import UserError
    from peft.recipes import bases, saved

    class Tokenizer:
        def __call__(self, text):
            return SimpleNamespace(input_ids=TOKENS[0].tolist())

        def save_pretrained(self, folder):
            pass

    class Task:
        auto = LlamaForCausalLM
        tokenizer = Tokenizer()

    monkeypatch.setattr(saved, "open_adapter", lambda path: None)
    monkeypatch.setattr(saved, "load", lambda found, **_: SimpleNamespace(model=adapted(), task=Task(), source=None))
    broken = False

    def load_base(source, auto, dtype, **_):
        again = LlamaForCausalLM.from_pretrained(source.path)
        if broken:  # what is on disk is not what was live
            again.model.layers[0].self_attn.q_proj.weight.data += 0.5
        return again

    monkeypatch.setattr(bases, "load_base", load_base)
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
    tied = base.lm_head.weight is base.get_input_embeddings().weight  # an assert of pytest's would compute with it
    assert tied


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
        held = [m.held_alone() for _, m in model.roster.adapters["b"].methods if isinstance(m, Exclusive)]
        if any(held):
            with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
                model.base_model.set_adapter(["default", "b"])
            assert torch.equal(model(*inputs), alone["b"])
            return
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
                m.lora_A_weight.fill_(500)
                m.lora_B_weight.fill_(500)
    before = state(model)
    with pytest.raises(ValueError, match="NaN or inf"):
        model.base_model.merge_adapter()
    assert same(state(model), before) and not any(layer.merged for layer in adapted_layers(model))
