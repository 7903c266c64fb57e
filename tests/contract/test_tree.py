"""Walks through a model that see past the wrappers of adapters."""

from __future__ import annotations

from torch import nn

from peft import LoraConfig, get_peft_model
from peft.contract.tree import AdapterContainer, Composite, Wrapper, named, tree


def adapted() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    return get_peft_model(net, LoraConfig(r=2, target_modules=["0"])).get_base_model()


def test_the_tree_is_that_of_the_base_unless_wrappers_are_asked_for():
    base = adapted()
    assert [type(m) for m in tree(base)] == [nn.Sequential, nn.Linear, nn.BatchNorm1d]
    whole = list(tree(base, wrappers=True))
    assert len(whole) == 4 and isinstance(whole[1], Wrapper)


def test_a_module_that_hangs_twice_is_met_once():
    shared, between = nn.Linear(2, 2), nn.ReLU()
    net = nn.Sequential(shared, between, shared)
    assert list(tree(net)) == [net, shared, between]


def test_tensors_have_their_name_in_the_base_and_the_one_as_they_hang():
    base = adapted()
    assert [(name, held) for name, held, _ in named(base, "_parameters")] == [
        ("0.weight", "0.base_layer.weight"),
        ("0.bias", "0.base_layer.bias"),
        ("1.weight", "1.weight"),
        ("1.bias", "1.bias"),
    ]
    own = dict(base.named_parameters())
    assert all(own[held] is p for _, held, p in named(base, "_parameters"))
    assert [n for n, _, _ in named(base, "_buffers")] == [
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    ]


def test_a_container_tells_its_layer_when_something_takes_a_methods_place():
    base = adapted()
    layer = base[0]
    (method,) = layer.methods["default"]
    assert isinstance(layer.adapters, AdapterContainer)
    around = nn.Sequential(method)
    layer.adapters.default = around
    assert layer.methods["default"] == (around,)


def test_a_composite_answers_with_the_attributes_of_what_it_stands_for():
    made = Composite()
    made.base_layer = nn.Linear(3, 7)
    assert made.out_features == 7
