"""A method around a delta: what it does not state itself is the wrapped method's."""

from __future__ import annotations

import torch
from torch import nn

from peft.contract.geometry import plain_geometry
from peft.contract.method import Method
from peft.contract.site import Site
from peft.contract.tensors import Stored
from peft.core.forms.wrapped import Around


class Inner(Method):
    tensors = {"a": Stored(shape="2 fan_in", shrinks=0), "b": Stored(shape="out 2", frozen=True)}
    prefix = "inner_"

    def __init__(self, config, site):
        super().__init__(config, site)
        self.create(site)

    def reset(self, rng, site):
        nn.init.ones_(self.a)
        nn.init.ones_(self.b)

    def delta(self):
        return self.a, self.multiplier * self.b

    def rank(self):
        return 2

    def stored(self, attr, tensor):
        return tensor[:1] if attr == "a" else tensor


class Longer(Around):
    """W' = W + ΔW + g."""

    def own_tensors(self):
        return {"g": Stored(shape="1")}

    def start(self, rng, site):
        nn.init.constant_(self.g, 5.0)

    def weight(self, W):
        return W + self.inner.dense() + self.g


def made():
    site = Site("site", plain_geometry(3, 4), lambda: torch.zeros(3, 4), dict, dict, torch.device("cpu"), torch.float32)
    method = Longer(None, site, Inner(None, site))
    method.reset(torch.Generator(), site)
    return method


def test_it_starts_what_it_wraps_and_adds_to_it():
    method = made()
    assert torch.equal(method.weight(torch.zeros(3, 4)), torch.full((3, 4), 7.0))
    assert method.nested() == (method, method.inner) and method.rank() == 2 and method.bias_change() is None
    assert method.penalty() is None and not method.derives


def test_strength_and_dropout_are_the_wrapped_methods():
    method = made()
    method.multiplier, method.dropout = 0.5, 0.25
    assert (method.inner.multiplier, method.inner.dropout) == (0.5, 0.25) == (method.multiplier, method.dropout)
    assert torch.equal(method.weight(torch.zeros(3, 4)), torch.full((3, 4), 6.0))


def test_the_file_holds_both_and_the_wrapped_methods_part_as_it_stores_it():
    method = made()
    assert method.table.keys == {"inner.a": "a", "inner.b": "b", "g": "g"} and method.table.frozen == ("inner.b",)
    assert len(method.stored("inner.a", method.inner.a)) == 1 and len(method.stored("inner.b", method.inner.b)) == 3
    assert method.stored("g", method.g) is method.g
    method.resize({"inner.a": torch.zeros(1, 4), "g": torch.zeros(1)})
    assert method.inner.a.shape == (1, 4)
