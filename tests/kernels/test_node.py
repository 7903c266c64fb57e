"""What the autograd nodes share: an output that is used as a plain layer's is, and derivatives of derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft import LoraConfig, VeraConfig, get_peft_model
from peft.kernels.node import as_output

CONFIGS = {
    "low rank": LoraConfig(target_modules=["0"], r=2),
    "with dropout": LoraConfig(target_modules=["0"], r=2, lora_dropout=0.5),
    "scaled rows": LoraConfig(target_modules=["0"], r=2, use_dora=True),
    "scaled rows with dropout": LoraConfig(target_modules=["0"], r=2, use_dora=True, lora_dropout=0.5),
    "banks": VeraConfig(target_modules=["0"], r=2),
}


def gradients(config, shape, bias, inplace, rows):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8, bias=bias), nn.ReLU(inplace=inplace))
    model = get_peft_model(net, copy.deepcopy(config))
    model.add_adapter("b", copy.deepcopy(config))
    for name in ("default", "b"):
        for p in model.adapter_parameters(name):
            p.data += 0.3 * torch.randn_like(p)
    x = torch.randn(shape, requires_grad=True)
    torch.manual_seed(1)
    names = {"adapter_names": ["default", "b", "default"][: shape[0]]} if rows else {}
    y = model.train()(x, **names)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.adapter_parameters("default"))]


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("shape", "rows"), [((8,), False), *(((*s, 8), rows) for s in ((3,), (3, 2)) for rows in (False, True))], ids=str
)
@pytest.mark.parametrize("case", CONFIGS)
def test_what_follows_may_write_into_the_output_in_place(case, shape, bias, rows):
    """`nn.ReLU(inplace=True)` behind an adapted layer gives what the same without `inplace` gives, gradients included."""
    for a, b in zip(*(gradients(CONFIGS[case], shape, bias, inplace, rows) for inplace in (True, False)), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_an_output_is_the_same_memory_but_no_view():
    whole = torch.randn(6, 4)
    part = whole.view(2, 3, 4)
    made = as_output(part)
    assert made.data_ptr() == whole.data_ptr() and torch.equal(made, part) and not made._is_view()
    assert as_output(whole) is whole
