"""Sums of squared gradients, example by example, and probes that stand for whole parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft.measure.gradients import probing, squared_gradients


def cross_entropy(model, example):
    return nn.functional.cross_entropy(model(example[0]), example[1])


def test_each_example_is_differentiated_alone():
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 3), torch.randn(5, 6), torch.randint(3, (5,))
    tensors = dict(model.named_parameters())
    found = squared_gradients(model, tensors, [(x[:2], y[:2]), (x[2:], y[2:])], cross_entropy, num_samples=4)
    for n, p in tensors.items():
        alone = [torch.autograd.grad(cross_entropy(model, (x[i : i + 1], y[i : i + 1])), p)[0] for i in range(4)]
        torch.testing.assert_close(found[n], sum(g**2 for g in alone))
        assert p.grad is None


def test_the_model_is_measured_in_evaluation_mode_and_goes_on_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9))
    modes = []

    def loss(m, example):
        modes.append(m.training)
        return m(example).sum()

    model.train()
    tensors = {"used": model[0].weight, "unused": torch.zeros(2, requires_grad=True)}
    found = squared_gradients(model, tensors, [torch.ones(2, 4)], loss)
    assert modes == [False, False] and model.training
    assert torch.equal(found["used"], torch.full((4, 4), 2.0)) and not found["unused"].any()
    with pytest.raises(ValueError, match="`batches` holds no examples"):
        squared_gradients(model.eval(), tensors, [], loss)
    assert not model.training


class Probed(nn.Module):
    def __init__(self):
        super().__init__()
        self.held, self.base = nn.Parameter(torch.zeros(1)), torch.ones(2, 3)
        self.shapes, self.probes = {"weight": self.base.shape}, {}

    def forward(self, x):
        return x @ (self.base + self.probes["weight"]).T


def test_probes_have_the_gradients_of_the_parameters_and_are_gone_afterwards():
    method = Probed()
    with probing({"at": method}) as probes:
        assert list(probes) == [("at", "weight")] and probes["at", "weight"] is method.probes["weight"]
        found = squared_gradients(method, probes, [torch.tensor([[1.0, 2.0, 3.0]])], lambda m, x: m(x).sum())
    assert torch.equal(found["at", "weight"], torch.tensor([[1.0, 4.0, 9.0]] * 2)) and method.probes == {}
    with pytest.raises(RuntimeError), probing({"at": method}):
        raise RuntimeError
    assert method.probes == {}
