"""Weights that accelerate's hooks keep elsewhere: brought in, written so that they stay, and put back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft.contract.offload import Written, home, on_device, put_back, sources, store

accelerate_hooks = pytest.importorskip("accelerate.hooks")
X = torch.ones(1, 3)


def offloaded() -> tuple[nn.Linear, torch.Tensor]:
    layer = nn.Linear(3, 2)
    out = layer(X).detach()
    hook = accelerate_hooks.AlignDevicesHook(execution_device="cpu", offload=True)
    return accelerate_hooks.add_hook_to_module(layer, hook), out


def test_weights_are_here_within_and_away_after():
    layer, out = offloaded()
    assert layer.weight.is_meta
    with on_device(layer):
        assert not layer.weight.is_meta and torch.equal(layer(X), out)
    assert layer.weight.is_meta and torch.equal(layer(X), out)


def test_a_written_weight_stays_until_it_is_put_back():
    layer, out = offloaded()
    before = sources(layer)
    with on_device(layer):
        layer.weight.data = layer.weight.data + 1
        store(layer, ["weight"])
    assert torch.allclose(layer(X), out + 3)
    put_back(before)
    assert torch.equal(layer(X), out)


def test_written_values_hide_those_of_the_source_and_never_change_it():
    source = {"a": 1, "b": 2}
    once = Written(source, {"a": 10})
    twice = Written(once, {"c": 30})
    assert dict(twice) == {"a": 10, "b": 2, "c": 30} and len(twice) == 3 and twice.source is source
    assert dict(once) == {"a": 10, "b": 2} and source == {"a": 1, "b": 2}


def test_home_is_where_the_hook_computes():
    layer, _ = offloaded()
    assert home(layer) == torch.device("cpu") and home(nn.Linear(2, 2)) is None
