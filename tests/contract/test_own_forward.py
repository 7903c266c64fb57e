"""Whose forward a module runs, and that forward with other tensors."""

from __future__ import annotations

import functools
import threading
import types

import torch
from torch import nn
from torch.nn import functional as F

from peft.contract.own_forward import computed, forward_of, holds, run_with, runs_as, written_as


class Same(nn.Linear):
    def forward(self, given):
        """Passes on."""
        return super().forward(given)


class Reference(nn.Linear):
    def forward(self, x):
        return super().forward(x)


class Twice(nn.Linear):
    def forward(self, x):
        return super().forward(super().forward(x))


class Below(Twice):
    def forward(self, x):
        return super().forward(x)


def test_a_forward_is_compared_instruction_by_instruction_and_by_what_it_calls():
    assert runs_as(nn.Linear(2, 2), nn.Linear) and not runs_as(Same(2, 2), nn.Linear)
    assert written_as(Same(2, 2), nn.Linear, Reference) is Reference
    assert written_as(Twice(2, 2), nn.Linear, Reference) is None
    assert written_as(Below(2, 2), nn.Linear, Reference) is None  # its `super()` is another forward


def test_accelerates_hooks_are_looked_through_and_other_replacements_are_not():
    layer = nn.Linear(2, 2)
    layer._hf_hook, layer._old_forward = object(), layer.forward
    layer.forward = functools.partial(lambda module, x: module._old_forward(x), layer)
    assert runs_as(layer, nn.Linear)
    other = nn.Linear(2, 2)
    other.forward = lambda x: x
    assert not runs_as(other, nn.Linear) and forward_of(other) is other.__dict__["forward"]


def test_a_method_that_the_forward_is_made_of_counts():
    class Own(nn.Conv1d):
        def _conv_forward(self, x, weight, bias):
            return 2 * super()._conv_forward(x, weight, bias)

    assert runs_as(nn.Conv1d(1, 1, 1), nn.Conv1d, "_conv_forward") and not runs_as(
        Own(1, 1, 1), nn.Conv1d, "_conv_forward"
    )


def test_which_weights_a_change_can_be_added_to():
    layer = nn.Linear(3, 2)
    assert holds(layer, (2, 3)) and not holds(layer, (3, 2)) and not computed(layer)
    layer.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), requires_grad=False)
    assert not holds(layer, (2, 3))
    layer.weight = nn.Parameter(torch.zeros(2, 3).to(torch.float8_e4m3fn), requires_grad=False)
    assert not holds(layer, (2, 3))
    assert computed(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))


def test_it_runs_with_other_tensors_and_the_module_keeps_its_own():
    for layer in (Same(3, 2), nn.Linear(3, 2)):
        if type(layer) is nn.Linear:
            layer.forward = types.MethodType(lambda self, x: F.linear(x, self.weight, self.bias), layer)
        W, x = torch.randn(2, 3), torch.randn(4, 3)
        before = layer.weight
        assert torch.allclose(run_with(layer, {"weight": W}, (x,), {}), F.linear(x, W, layer.bias))
        assert layer.weight is before and torch.allclose(layer(x), F.linear(x, before, layer.bias))


def test_a_forward_that_is_bound_to_nothing_is_swapped_into():
    layer = nn.Linear(3, 2)
    layer.forward = lambda x: F.linear(x, layer.weight)
    W, x = torch.randn(2, 3), torch.randn(4, 3)
    assert torch.allclose(run_with(layer, {"weight": W}, (x,), {}), x @ W.T)


def test_other_threads_see_the_modules_own_weight_meanwhile():
    inside, go_on = threading.Event(), threading.Event()

    class Waits(nn.Linear):
        def forward(self, x, wait=False):
            if wait:
                inside.set()
                go_on.wait(10)
            return super().forward(x)

    layer, W, x, found = Waits(3, 2), torch.randn(2, 3), torch.randn(4, 3), {}
    with torch.no_grad():
        expected = layer(x)
        thread = threading.Thread(target=lambda: found.update(y=run_with(layer, {"weight": W}, (x,), {"wait": True})))
        thread.start()
        assert inside.wait(10) and torch.equal(layer(x), expected)
        go_on.set()
        thread.join()
        assert torch.allclose(found["y"], F.linear(x, W, layer.bias))
