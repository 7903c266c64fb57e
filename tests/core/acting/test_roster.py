"""The record of a model's adapters: which act, which train, which names are free; and recomputes under their mix."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft import LoraConfig, get_peft_model
from peft.core.acting.mix import Mix
from peft.core.acting.roster import Roster


def model():
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    made = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config, adapter_name="a")
    made.add_adapter("b", config)
    return made, made.roster


def training(made) -> set[str]:
    return {n.split(".adapters.")[1].split(".")[0] for n, p in made.named_parameters() if p.requires_grad}


def test_activating_replaces_one_object_and_keeps_the_order():
    _, roster = model()
    before = roster.mix
    roster.activate(["b", "a", "b"])
    assert roster.chosen == roster.mix.active == ("b", "a") and before.active == ("a",)
    with pytest.raises(ValueError, match=r"Adapter c not found: 'c' is not loaded. Loaded: \['a', 'b'\]"):
        roster.activate(["c"])
    assert roster.chosen == ("b", "a")


def test_what_is_chosen_outlasts_being_disabled():
    _, roster = model()
    roster.enable(False)
    assert roster.mix == Mix() and roster.chosen == ("a",)
    roster.activate(["b"])
    assert roster.mix == Mix(), "still disabled"
    roster.enable(True)
    assert roster.mix.active == ("b",)


def test_training_is_of_the_named_adapters_alone_and_is_known_without_a_look():
    made, roster = model()
    roster.train_only(["b"])
    assert training(made) == roster.training == {"b"}
    roster.activate(["b"])
    assert roster.trains_only(["b"]) and not roster.trains_only(["b"], inference_mode=True)
    roster.train_only(["b"], inference_mode=True)
    assert training(made) == set() and roster.trains_only(["b"], inference_mode=True)


def test_a_forgotten_name_is_free_and_another_adapter_acts():
    made, roster = model()
    made.peft_config.pop("a")
    assert list(roster.adapters) == ["b"] and roster.chosen == ("b",) and roster.forgotten == {"a"}
    made.peft_config.pop("never", None)
    assert list(roster.adapters) == ["b"]


def test_a_name_is_free_when_the_last_layer_let_go_of_it():
    _, roster = model()
    (_, first), (_, second) = roster.adapters["a"].methods
    roster.released("a", [first])
    assert "a" in roster.adapters and roster.adapters["a"].targeted == ["1"]
    roster.released("a", [second])
    assert "a" not in roster.adapters


def test_a_mix_is_used_for_a_while_also_after_an_error():
    roster = Roster()
    before, other = roster.mix, Mix(("x",))
    with pytest.raises(ZeroDivisionError), roster.using(other):
        assert roster.mix is other
        raise ZeroDivisionError
    assert roster.mix is before


def test_a_bound_checkpoint_recomputes_with_the_adapters_of_its_forward():
    made, roster = model()
    x = torch.randn(3, 4, requires_grad=True)
    expected = torch.autograd.grad(made(x).sum(), x)[0]
    out = roster.bound(checkpoint)(made.get_base_model(), x, use_reentrant=False)
    roster.activate(["b"])
    assert torch.allclose(torch.autograd.grad(out.sum(), x)[0], expected, atol=1e-6)
    assert roster.bound(bound := roster.bound(checkpoint)) is bound


def test_a_recompute_that_nothing_bound_is_an_error_under_another_mix():
    made, roster = model()
    out = checkpoint(made.get_base_model(), torch.randn(3, 4, requires_grad=True), use_reentrant=False)
    roster.activate(["b"])
    with pytest.raises(RuntimeError, match=r"recomputed in backward with adapters \['b'\]"):
        out.sum().backward()
