"""Promises 12 (weights swapped into a running model) and 26 (what adding and switching cost)."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from peft import CheckpointError, LoraConfig, PeftModel, get_peft_model, registry
from peft.core.adapted.layer import adapted_layers
from peft.core.load import hotswap
from tests.helpers.cells import randomise
from tests.promises.models import adapted, each_method, llama, logits, lora, rename_keys, same, state


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
    del method._parameters["lora_A_weight"]
    model.set_adapter("a")
    assert method.lora_B_weight.requires_grad and all(m.lora_A_weight.requires_grad for _, m in rest)
    model.set_adapter("b")
    assert not method.lora_B_weight.requires_grad and not any(m.lora_A_weight.requires_grad for _, m in rest)


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
