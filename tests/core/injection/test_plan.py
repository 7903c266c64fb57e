"""Plans: what would go into a model, which is not changed; seeds of sites; names of adapters."""

from __future__ import annotations

import pytest
import torch

from peft import LoraConfig, NoMatchingPeftModuleError, get_peft_model
from peft.core.acting.on_model import roster_of
from peft.core.injection.dry_run import dry_run
from peft.core.injection.plan import check_name, plan, seed_for
from tests.helpers.tiny_llama import llama, lora


def test_a_plan_says_what_would_go_where_and_changes_nothing():
    model = llama()
    before = {n: (type(m), m.training) for n, m in model.named_modules()}
    trains = [p.requires_grad for p in model.parameters()]
    made = plan(model, lora(modules_to_save=["lm_head"]))
    assert [(i.path, i.brought_by, i.shape, i.parameters) for i in made.items] == [
        *((f"model.layers.{i}.self_attn.{p}_proj", "", (16, 16), 4 * 32) for i in (0, 1) for p in "qv"),
        ("lm_head", "modules_to_save", (64, 16), 64 * 16),
    ]
    assert made.adapter().targeted == [i.path for i in made.items][:4]
    assert roster_of(model) is None and [p.requires_grad for p in model.parameters()] == trains
    assert {n: (type(m), m.training) for n, m in model.named_modules()} == before


def test_a_sites_seed_is_of_the_adapters_seed_and_its_path_alone():
    assert seed_for(3, "a.b") == seed_for(3, "a.b")
    assert len({seed_for(s, p) for s in range(20) for p in ("a", "a.b", "b", "")}) == 80
    assert all(0 <= seed_for(s, "x") < 2**56 for s in range(20))
    first, second = (
        plan(llama(), LoraConfig(target_modules=t, seed=5)).items for t in (["v_proj"], ["q_proj", "v_proj"])
    )
    drawn = {i.path: i.method.lora_A_weight for i in second}
    assert all(torch.equal(i.method.lora_A_weight, drawn[i.path]) for i in first)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\0b", None])
def test_names_that_no_folder_may_have_are_refused(name):
    with pytest.raises(ValueError, match="expected a name that a folder may have"):
        check_name(None, name)


def test_a_name_that_is_taken_is_refused_with_those_that_are():
    model = get_peft_model(llama(), lora(), adapter_name="mine").get_base_model()
    with pytest.raises(ValueError, match=r"mine already exists. Loaded: \['mine'\]"):
        plan(model, lora(), "mine")
    check_name(roster_of(model), "another")


def test_a_plan_on_the_meta_device_holds_no_memory_and_draws_nothing():
    model = llama()
    draws = torch.get_rng_state()
    made = plan(model, lora(), init=False, meta=True)
    assert all(p.is_meta for i in made.items for p in i.method.parameters())
    assert torch.equal(torch.get_rng_state(), draws)


def test_a_dry_run_sees_past_the_wrapper_and_other_adapters():
    rows = [(r.path, r.shape) for r in dry_run(llama(), lora())]
    assert rows == [(r.path, r.shape) for r in dry_run(get_peft_model(llama(), lora()), lora())]
    with pytest.raises(NoMatchingPeftModuleError):
        dry_run(llama(), lora(target_modules=["no_such"]))


@pytest.mark.parametrize("name", ["__base__", "a" * 256, "é" * 128])
def test_names_that_mean_something_else_or_are_too_long_for_a_folder_are_refused(name):
    with pytest.raises(ValueError, match="Adapter name"):
        check_name(None, name)
