"""What every kind of layer can do: write values into a module, bring the very bits back, part what is tied."""

from __future__ import annotations

import torch
from torch import nn

from peft.contract.kind import LayerKind

KIND = LayerKind()


def test_what_was_written_goes_again_with_the_very_parameter():
    layer = nn.Linear(3, 2)
    parameter, bits = layer.weight, layer.weight.data.clone()
    kept = KIND.keep(layer, ["weight"])
    KIND.write(layer, {"weight": torch.ones(2, 3)})
    assert torch.equal(KIND.read(layer), torch.ones(2, 3))
    KIND.restore(layer, kept)
    assert layer.weight is parameter and torch.equal(layer.weight, bits)


def test_a_bias_that_was_not_there_is_made_and_goes_again():
    layer = nn.Linear(3, 2, bias=False)
    kept = KIND.keep(layer, ["bias"])
    KIND.write(layer, {"bias": torch.tensor([1.0, 2.0])})
    assert torch.equal(layer(torch.zeros(3)), torch.tensor([1.0, 2.0])) and not layer.bias.requires_grad
    KIND.restore(layer, kept)
    assert layer.bias is None


def test_dotted_names_and_buffers_are_written_where_they_are_held():
    block = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    KIND.write(block, {"0.bias": torch.full((2,), 5.0), "1.running_mean": torch.full((2,), 7.0)})
    assert block[0].bias.tolist() == [5, 5] and block[1].running_mean.tolist() == [7, 7]


def test_only_a_tied_parameter_is_parted_from_its_other_end():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    tied = {id(a.weight)}
    assert KIND.untie(b, ["weight", "bias"], tied)
    assert b.weight is not a.weight and torch.equal(b.weight, a.weight)
    assert not KIND.untie(b, ["weight", "bias"], tied)


def test_adapters_follow_the_layers_first_floating_dtype():
    assert KIND.dtype(nn.Linear(2, 2).to(torch.bfloat16)) is torch.bfloat16
    assert KIND.dtype(nn.Sequential(nn.Linear(2, 2).double())) is torch.float64
    assert KIND.dtype(nn.ReLU()) is torch.get_default_dtype()
