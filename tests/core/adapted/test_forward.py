"""y = op(x, W + Σ ΔW + Σ (f(W) − W)) + b at one layer: both ways of computing it, and trained copies added up."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import peft
from peft import BitFitConfig, LoraConfig, OFTConfig, get_peft_model
from peft.contract.tree import AdapterContainer
from peft.core.adapted.forward import Forward
from peft.core.adapted.layer import adapted_layers
from tests.helpers.tiny_llama import llama


def layer_with(*configs, base: nn.Module | None = None) -> tuple[nn.Module, Forward]:
    """A model of one layer in which all these adapters act, with values away from their start."""
    net = nn.Sequential(base if base is not None else nn.Linear(8, 8))
    model = get_peft_model(net, configs[0], adapter_name="0")
    for i, config in enumerate(configs[1:], 1):
        model.add_adapter(str(i), config)
    with torch.no_grad():
        for name in model.peft_config:
            for p in model.adapter_parameters(name):
                p.add_(0.3 * torch.randn_like(p))
    model.base_model.set_adapter(list(model.peft_config))
    layer = model.get_base_model()[0]
    assert isinstance(layer, Forward)
    return model.eval(), layer


def test_changes_add_up_from_the_base_weight_and_input_transforms_act_on_their_sum():
    target = {"target_modules": ["0"]}
    lora, dora, oft = (
        LoraConfig(r=2, **target),
        LoraConfig(r=2, use_dora=True, **target),
        OFTConfig(oft_block_size=4, **target),
    )
    model, layer = layer_with(lora, dora, oft)
    delta, scaled, turned = (layer.methods[str(i)][0] for i in range(3))
    W, b = layer.base_layer.weight, layer.base_layer.bias
    changed = W + delta.dense() + (scaled.weight(W) - W)
    composed, bias = layer.compose((delta, scaled, turned), torch.float32)
    assert torch.allclose(turned.fold(changed, b)[0], composed, atol=1e-5) and torch.equal(bias, b)
    x = torch.randn(3, 8)
    assert torch.allclose(model(x), F.linear(turned.before(x), changed, b), atol=1e-5)
    assert torch.allclose(model(x), F.linear(x, composed, b), atol=1e-5)
    assert not torch.allclose(composed, changed, atol=1e-2) and not torch.allclose(
        model(x), F.linear(x, W, b), atol=1e-2
    )


def test_a_convolution_runs_with_the_composed_weight():
    config = LoraConfig(r=2, target_modules=["0"])
    model, layer = layer_with(config, OFTConfig(oft_block_size=6, target_modules=["0"]), base=nn.Conv2d(4, 6, 3))
    x = torch.randn(2, 4, 5, 5)
    W, b = layer.compose([m for ms in layer.methods.values() for m in ms], torch.float32)
    assert torch.allclose(model(x), F.conv2d(x, W.view(6, 4, 3, 3), b), atol=1e-5)


def test_trained_copies_of_one_parameter_add_their_changes():
    model, layer = layer_with(BitFitConfig(target_modules=["0"]), BitFitConfig(target_modules=["0"]))
    first, second = (layer.methods[n][0] for n in "01")
    b = layer.base_layer.bias
    expected = first.bitfit_layers_copy.bias + (second.bitfit_layers_copy.bias - b)
    assert torch.allclose(layer.replaced((first, second))["bias"], expected)
    x = torch.randn(3, 8)
    assert torch.allclose(model(x), F.linear(x, layer.base_layer.weight, expected), atol=1e-5)


class Unit(torch.nn.Module):
    """What FSDP 1 puts in the place of a module that it wraps: calls it, forwards attributes, is no instance of its class."""

    def __init__(self, module):
        super().__init__()
        self.held = module

    def forward(self, *args):
        return self.held(*args)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.held, name)


def in_units(model):
    """Every method of a model inside a stand-in, as a wrap policy leaves them."""
    for layer in adapted_layers(model):
        for container in (layer.adapters, *(m for m in layer.adapters.children() if isinstance(m, AdapterContainer))):
            for name, method in list(container._modules.items()):
                if not isinstance(method, AdapterContainer):
                    setattr(container, name, Unit(method))
    return model


def test_stand_ins_around_methods_leave_them_what_they_can(tmp_path):
    """Positions with padding on the left, and token rows of a table whose weight is read raw."""
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    mask = (ids != 0).long()
    for config in (
        peft.LoReftConfig(
            target_modules=r".*layers\.\d", prefix_positions=1, suffix_positions=1, init_weights="random"
        ),
        peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 5]),
    ):
        model = get_peft_model(llama(), config).eval()
        for p in model.adapter_parameters("default"):
            p.data += 0.3 * torch.randn_like(p)
        rows = model.get_base_model().get_input_embeddings()
        with torch.no_grad():
            before = model(input_ids=ids, attention_mask=mask).logits, rows.weight.clone()
            in_units(model)
            assert any(
                isinstance(m, Unit) for layer in adapted_layers(model) for ms in layer.methods.values() for m in ms
            )
            after = model(input_ids=ids, attention_mask=mask).logits, rows.weight.clone()
        assert torch.equal(before[0][mask.bool()], after[0][mask.bool()]) and torch.equal(before[1], after[1])
