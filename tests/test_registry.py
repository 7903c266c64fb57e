"""Methods and kinds are found in their folders; a class or a kind of one's own is as good as a file."""

from __future__ import annotations

import pkgutil

import pytest
from torch import nn

import peft.methods
from peft import registry
from peft.contract.kind import LayerKind
from peft.contract.method import Method
from peft.core.anatomy.walk import kind_of


def test_every_file_of_methods_is_imported_and_registers_one():
    files = {m.name for m in pkgutil.iter_modules(peft.methods.__path__)}
    assert {m.__module__.rpartition(".")[2] for m in registry.methods().values()} >= files
    assert set(registry.methods()) <= set(registry.PeftType.__members__)


def test_companions_and_wrappers_are_found_by_the_field_that_asks_for_them():
    assert set(registry.companions()) == {
        "modules_to_save",
        "bias",
        "trainable_token_indices",
        "saved_embeddings",
    }
    assert set(registry.wrappers()) == {"use_dora"}


def test_a_class_with_a_name_is_a_method_and_can_be_forgotten():
    before = registry.methods()

    class Own(Method):
        peft_type = "A_TESTS_OWN"

    try:
        assert registry.method("A_TESTS_OWN") is Own and registry.PeftType("A_TESTS_OWN") == "A_TESTS_OWN"
    finally:
        registry.forget_method("A_TESTS_OWN")
    assert registry.methods() == before


def test_an_unknown_method_is_told_what_is_near():
    assert registry.method(registry.PeftType("LORA")) is registry.methods()["LORA"]
    with pytest.raises(ValueError, match=r"Unknown method 'LORE'\. Known: .*LORA"):
        registry.method("LORE")


def test_kinds_are_asked_in_the_order_of_their_priority(monkeypatch):
    priorities = [k.priority for k in registry.kinds().values()]
    assert priorities == sorted(priorities, reverse=True)

    class Mine(nn.Linear):
        pass

    class OwnKind(LayerKind):
        name, priority = "a test's own", 10_000

        def claims(self, module):
            return type(module) is Mine

    monkeypatch.setattr(registry, "_EXTRA_KINDS", [])
    try:
        registry.register_kind(own := OwnKind())
        assert next(iter(registry.kinds().values())) is own
        assert kind_of(Mine(2, 2)) is own and kind_of(nn.Linear(2, 2)) is not own
    finally:
        registry._EXTRA_KINDS.clear()
        registry.kinds.cache_clear()
        for forget in registry.WHEN_KINDS_CHANGE:
            forget()
    assert kind_of(Mine(2, 2)).name == "linear"
