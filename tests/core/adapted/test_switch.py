"""Switching adapters at a layer, which switches the model; and names of adapters as names of modules."""

from __future__ import annotations

import torch
from torch import nn

from peft import LoraConfig, VeraConfig, get_peft_model
from peft.core.adapted.switch import Switch, escape
from tests.helpers.cells import randomise

NAMES = ["a", "a.b", "a%2Eb", "a(b)", "weight", "%weight", "forward", "%forward", "training", "%training", "", "%"]


def test_names_become_attributes_that_no_module_has_each_its_own():
    escaped = [escape(n) for n in NAMES]
    assert len(set(escaped)) == len(NAMES)
    assert not any(set(e) & set(".()") or hasattr(nn.Module, e) or e in ("training", "") for e in escaped)
    assert escape("plain name") == "plain name"


def two_layers():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    config = LoraConfig(r=2, target_modules=["0", "1"])
    model = get_peft_model(net, config, adapter_name="a")
    model.add_adapter("b", config)
    return model, *model.get_base_model()


def test_a_layer_switches_the_whole_model_and_trains_what_it_named():
    model, first, second = two_layers()
    assert isinstance(first, Switch) and first.active_adapter == ["a"]
    first.set_adapter("b")
    assert second.active_adapters == ["b"] and model.active_adapters == ["b"]
    trained = {n.split(".adapters.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"b"}
    second.active_adapter = "a"
    assert first.active_adapters == ["a"]


def test_names_that_this_model_lacks_are_passed_over_and_told_as_asked():
    model, first, _ = two_layers()
    first.set_adapter(["b", "another model's"])
    assert model.active_adapters == ["b"] and first.active_adapters == ["b", "another model's"]


def test_layers_are_switched_off_each_for_itself_and_on_with_the_model():
    model, first, second = two_layers()
    first.disable_adapters = True
    assert first.disable_adapters and not second.disable_adapters and model.roster.enabled
    second.enable_adapters(False)
    first.enable_adapters(True)
    assert second.disable_adapters and not first.disable_adapters
    model.base_model.disable_adapter_layers()
    assert first.disable_adapters
    model.base_model.enable_adapter_layers()
    assert not first.disable_adapters and not second.disable_adapters


def test_where_only_companions_hang_those_are_listed_that_have_one():
    """As upstream's: its layers tell what was asked for, its wrappers of whole modules what they hold."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"]))
    layer, head = model.get_base_model()
    assert layer.active_adapters == head.active_adapters == ["a"]
    model.set_adapter("b")
    assert layer.active_adapters == ["b"] and head.active_adapters == []
    (companions,) = head.adapters.children()
    assert companions.active_adapters == []


def test_disabling_one_layer_freezes_and_silences_that_layer_alone():
    """And enabling it brings back what trained: upstream's layers do both."""
    model, first, second = two_layers()
    for i, name in enumerate("ab"):
        randomise(model, name, i)
    model.set_adapter("a")
    x = torch.randn(3, 4)
    whole = model(x)
    expected = second(first.base_layer(x))
    first.enable_adapters(False)
    assert torch.equal(model(x), expected) and not torch.allclose(whole, expected)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".1.adapters.a." in n for n in trained)
    with model.disable_adapter():
        assert first.disable_adapters and second.disable_adapters
    assert torch.equal(model(x), expected), "a context is over, and the layer is as it was"
    rows = model(x, adapter_names=["a", "b", "__base__"])
    assert torch.allclose(rows[0], expected[0], atol=1e-6)
    model.set_adapter("b")
    model.set_adapter("a")
    assert torch.equal(model(x), expected), "who acts is another choice"
    first.enable_adapters(True)
    assert torch.equal(model(x), whole)
    assert {n.split(".adapters.")[1][0] for n, p in model.named_parameters() if p.requires_grad} == {"a"}
    assert all(p.requires_grad for p in model.adapter_parameters("a"))


def test_a_merged_layer_that_is_disabled_is_the_base_layer():
    model, first, second = two_layers()
    randomise(model, "a", 1)
    x = torch.randn(3, 4)
    expected = first.base_layer(x)
    model.merge_adapter()
    first.enable_adapters(False)
    assert torch.equal(first(x), expected) and first.merged_adapters == [] and second.merged_adapters == ["a"]


def test_companions_are_switched_off_without_the_layers_own():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    config = LoraConfig(r=2, target_modules=["0", "1"], bias="all")
    model = get_peft_model(net, config, adapter_name="a")
    randomise(model, "a", 1)
    layer, x = model.get_base_model()[1], torch.randn(3, 4)
    both = layer(x)
    (companions,) = (m for m in layer.adapters.children() if isinstance(m, Switch))
    companions.enable_adapters(False)
    assert companions.disable_adapters and not layer.disable_adapters
    delta = next(m for m in layer.methods["a"] if m.form == "delta").dense()
    assert torch.allclose(layer(x), layer.base_layer(x) + x @ delta.T, atol=1e-5) and not torch.allclose(layer(x), both)
    companions.enable_adapters(True)
    assert torch.equal(layer(x), both)


def test_frozen_banks_stay_frozen():
    net = nn.Sequential(nn.Linear(4, 4))
    model = get_peft_model(net, VeraConfig(r=2, target_modules=["0"]))
    (layer,) = model.get_base_model()
    for _ in range(2):
        layer.enable_adapters(False)
        layer.enable_adapters(True)
        layer.set_requires_grad("default", True)
        trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {"vera_lambda_d_weight", "vera_lambda_b_weight"}
