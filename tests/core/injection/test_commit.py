"""Hanging a plan into a model: the base is frozen, the first adapter acts and trains, a later one does neither."""

from __future__ import annotations

import torch

from peft import LoraConfig, get_peft_model
from peft.core.acting.on_model import roster_of
from peft.core.adapted.layer import Adapted, adapted_layers
from peft.core.injection.commit import commit, inject
from peft.core.injection.plan import plan
from tests.helpers.tiny_llama import llama, logits, lora


def test_the_planned_methods_hang_where_the_plan_says():
    model = llama()
    base = logits(model)
    made = plan(model, lora())
    roster = commit(model, made)
    assert roster is roster_of(model) and list(roster.adapters) == ["default"]
    layers = {layer.path: layer for layer in adapted_layers(model)}
    assert list(layers) == [i.path for i in made.items]
    assert all(layers[i.path].methods["default"] == (i.method,) for i in made.items)
    assert not torch.equal(logits(model), base)


def test_only_the_first_adapter_acts_and_trains():
    model = llama()
    roster = inject(model, lora(), "a")
    out = logits(model)
    inject(model, lora(), "b")
    assert roster.chosen == ("a",) and torch.equal(logits(model), out)
    trained = {n.split(".adapters.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"a"}


def test_an_adapter_for_inference_acts_and_does_not_train():
    model = llama()
    roster = inject(model, lora(inference_mode=True))
    assert roster.chosen == ("default",) and not any(p.requires_grad for p in model.parameters())


def test_methods_take_their_layers_mode():
    for training in (True, False):
        model = llama().train(training)
        inject(model, lora())
        assert {m.training for layer in adapted_layers(model) for ms in layer.methods.values() for m in ms} == {
            training
        }


def test_a_second_adapter_uses_the_wrapper_that_is_there():
    model = get_peft_model(llama(), lora()).get_base_model()
    before = [id(layer) for layer in adapted_layers(model)]
    inject(model, LoraConfig(target_modules=["q_proj", "k_proj"]), "b")
    after = list(adapted_layers(model))
    assert set(before) <= {id(layer) for layer in after} and len(after) == len(before) + 2
    assert not any(isinstance(layer.base_layer, Adapted) for layer in after)
