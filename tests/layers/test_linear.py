"""Plain linear layers, and the subclasses that are ones."""

from __future__ import annotations

import torch
from torch import nn

from peft.core.anatomy.walk import kind_of
from peft.layers.linear import Linear, Passed, Spelled


def test_a_subclass_that_computes_what_its_parent_does_keeps_factored_adapters():
    from transformers.models.falcon.modeling_falcon import FalconLinear
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    class Renamed(nn.Linear):
        pass

    assert [
        kind_of(m).name for m in (FalconLinear(4, 4), Renamed(4, 4), Gemma3TextScaledWordEmbedding(9, 4, 0, 2.0))
    ] == [*("linear", "linear", "embedding")]


def test_the_spellings_are_the_layers_own_forward():
    x, kind = torch.randn(3, 4), Linear()
    for layer in (Spelled(4, 2), Spelled(4, 2, bias=False), Passed(4, 2)):
        assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias)) and kind.claims(layer)
        assert kind.as_linear(layer) is None  # fused kernels are for nn.Linear itself


def test_codes_under_the_plain_forward_are_not_taken():
    class Coded(nn.Linear):
        pass

    layer = Coded(4, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 4, dtype=torch.int8), requires_grad=False)
    assert not Linear().claims(layer)
