"""Layers with a computed weight: adapters stand beside them, and a merge makes them plain."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from peft import LoraConfig, Refusal, get_peft_model
from peft.core.anatomy.walk import kind_of
from peft.layers.computed import ComputedLinear, weight_of
from tests.helpers.layer_kind_cases import Holder
from tests.layers.holding import close, lora, shake


class Symmetric(nn.Module):
    def forward(self, W):
        return W.triu() + W.triu(1).T


def parametrized():
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def pruned():
    return prune.l1_unstructured(nn.Linear(8, 6), "weight", amount=0.5)


LAYERS = {
    "parametrized": (parametrized, (2, 8)),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(8, 6)), (2, 8)),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 6)), (2, 8)),
    "conv": (lambda: parametrizations.weight_norm(nn.Conv1d(4, 6, 3, groups=2), dim=2), (2, 4, 7)),
    "transposed": (lambda: parametrizations.weight_norm(nn.ConvTranspose2d(4, 6, 3)), (2, 4, 3, 3)),
    "older_weight_norm": (lambda: weight_norm(nn.Linear(8, 6)), (2, 8)),
    "older_spectral_norm": (lambda: spectral_norm(nn.Linear(8, 6)), (2, 8)),
    "pruned": (pruned, (2, 8)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_forward_equals_merged_and_unmerging_brings_the_computation_back(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make().eval(), torch.randn(*shape)
    with torch.no_grad():
        expected = layer(x)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    model = get_peft_model(Holder(layer), lora()).eval()
    assert torch.equal(model(x), expected)
    shake(model)
    out = model(x)
    out.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        model.base_model.merge_adapter()
        assert close(model(x), out) and not close(out, expected)
        model.base_model.unmerge_adapter()
        assert model.get_base_model().site.base_layer is layer
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
        merged = model.base_model.merge_and_unload().site
    assert type(merged) in (nn.Linear, nn.Conv1d, nn.ConvTranspose2d) and set(merged.state_dict()) == {"weight", "bias"}
    assert close(merged(x), out) and not hasattr(merged, "parametrizations") and not merged._forward_pre_hooks


def test_reading_a_weight_turns_no_vectors():
    layer = parametrizations.spectral_norm(nn.Linear(8, 6)).train()
    before = copy.deepcopy(layer.state_dict())
    W = weight_of(layer)
    assert (
        all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
        and layer.parametrizations.weight[0].training
    )
    assert torch.equal(W, layer.eval().weight)


def test_a_computed_bias_is_refused():
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    assert not isinstance(kind_of(layer), ComputedLinear)
    with pytest.raises(Refusal, match="Linear has a forward of its own|no single weight"):
        get_peft_model(Holder(layer), LoraConfig(target_modules=["site"]))
