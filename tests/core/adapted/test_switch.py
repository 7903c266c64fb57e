"""Switching adapters at a layer, which switches the model; and names of adapters as names of modules."""

from __future__ import annotations

from torch import nn

from peft import LoraConfig, get_peft_model
from peft.core.adapted.switch import Switch, escape

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


def test_disabling_through_a_layer_disables_the_model():
    model, first, second = two_layers()
    first.disable_adapters = True
    assert second.disable_adapters and not model.roster.enabled
    second.enable_adapters(True)
    assert not first.disable_adapters
