"""Bare parameters: matrices as they lie, and what has no input or output is refused what needs one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft import LoraConfig, Refusal, get_peft_model
from peft.layers.parameter import Mixture, Parameter
from peft.layers.stacked import _stack, _unstack
from tests.helpers.experts import adapted, base


def test_bare_parameters_refuse_what_needs_an_input_or_output():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.randn(8, 4))

        def forward(self, x):
            return x @ self.first.T

    net = nn.Sequential(Block())
    for fields, why in (({"lora_dropout": 0.1}, "no input"), ({"lora_bias": True}, "bias")):
        with pytest.raises(Refusal, match=why):
            get_peft_model(net, LoraConfig(target_modules=[], target_parameters=["first"], **fields))
        assert type(net[0]) is Block
    with pytest.raises(ValueError, match="experts.down_prj"):
        get_peft_model(base("mixtral"), LoraConfig(target_modules=[], target_parameters=["experts.down_prj"]))


def test_a_parameter_of_a_wrapped_module_is_refused():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    with pytest.raises(Refusal, match="wrap this module"):
        model.add_adapter("b", LoraConfig(target_modules=[], target_parameters=["0.weight"]))


@torch.no_grad()
def test_a_linear_layers_weight_and_a_conv1ds_are_matrices_as_they_lie(tmp_path):
    from transformers.pytorch_utils import Conv1D

    for layer, shapes in ((nn.Linear(6, 4), ((2, 6), (4, 2))), (Conv1D(4, 6), ((2, 4), (6, 2)))):
        model = adapted(nn.Sequential(layer), target_parameters=["0.weight"])
        x = torch.randn(3, 6)
        out, W = model(x), layer.weight.clone()
        model.save_pretrained(tmp_path)
        state = load_file(tmp_path / "adapter_model.safetensors")
        A, B = state["base_model.model.0.lora_A.weight"], state["base_model.model.0.lora_B.weight"]
        assert (tuple(A.shape), tuple(B.shape)) == shapes
        merged = model.merge_and_unload()
        assert torch.allclose(merged[0].weight, W + 8 / 2 * B @ A, atol=1e-6)
        assert torch.allclose(merged(x), out, atol=1e-5)


@pytest.mark.parametrize("how", [None, (0, 0), (2, 1)])
def test_stacked_factors_come_apart_again(how):
    parts = [torch.randn(2, 5) for _ in range(3)]
    whole = _stack(parts, how)
    assert whole.shape == {None: (3, 2, 5), (0, 0): (6, 5), (2, 1): (2, 15)}[how]
    assert all(torch.equal(a, b) for a, b in zip(_unstack(whole, 3, how), parts, strict=True))
    if how is not None:
        with pytest.raises(ValueError, match="does not divide among 4 experts"):
            _unstack(whole, 4, how)


def test_a_stack_has_a_part_for_each_of_its_matrices():
    stand_in = Parameter().stand_in(Mixture())
    assert list(stand_in.parts()) == ["weights[0]", "weights[1]", "weights[2]"]
    x = torch.randn(4, 16)
    assert torch.equal(stand_in(x), stand_in.base_layer(x))
