"""Convolutions against the layer's own geometry with an explicitly changed weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft.core.anatomy.walk import kind_of
from peft.layers.conv import Conv, ConvTranspose
from tests.layers.holding import adapted, close

GEOMETRIES = {
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 6, 5)),
    "reflect": (lambda: nn.Conv1d(4, 6, 5, padding=2, padding_mode="reflect"), (2, 4, 9)),
    "replicate": (lambda: nn.Conv3d(2, 6, (1, 3, 3), padding=1, padding_mode="replicate"), (2, 2, 3, 4, 4)),
    "dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 7, 7)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(6, 6, 3, groups=6, padding="same"), (2, 6, 7)),
    "same": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(1, 2)), (2, 4, 6, 7)),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid", stride=(2, 1)), (2, 4, 7, 7)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 5)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_lora_on_a_convolution_is_the_convolution_with_another_weight(name, fields):
    make, shape = GEOMETRIES[name]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    model = adapted(layer, **fields)
    with torch.no_grad():
        out = model(x)
        _, m = model.roster.adapters["default"].methods[0]
        inner = m.inner if fields.get("use_dora") else m
        W = layer.weight.flatten(1) + 2.0 * inner.lora_B_weight @ inner.lora_A_weight
        if fields.get("use_dora"):
            W = m.lora_magnitude_vector_weight[:, None] * W / W.norm(dim=1, keepdim=True)
        layer.weight.copy_(W.view_as(layer.weight))
        if fields.get("lora_bias"):
            layer.bias += 2.0 * m.lora_B_bias
        assert close(out, layer(x))
        model.base_model.merge_adapter()
        assert close(model(x), out)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolutions_matrix_is_its_linear_map(groups):
    # W[o, (i, tap)] is the weight that input channel i sends to output o through a tap; torch keeps [i, o / groups, tap].
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, (2, 3), groups=groups, stride=2)
    kind = kind_of(layer)
    W = kind.read(layer)
    assert W.shape == (6, 4 // groups * 6)
    for o in range(6):
        g = o // (6 // groups)
        mine = layer.weight[g * (4 // groups) : (g + 1) * (4 // groups), o % (6 // groups)]
        assert torch.equal(W[o], mine.flatten())
    assert torch.equal(kind.native(W, layer), layer.weight)


def test_the_matrix_is_the_kernel_flattened_and_comes_back():
    kind, layer = Conv(2), nn.Conv2d(4, 6, (3, 2), groups=2)
    g, W = kind.geometry(layer), kind.read(layer)
    assert (g.out, g.fan_in, g.inputs, g.kernel, g.groups) == (6, 2 * 6, 4, 6, 2) and W.shape == (6, 12)
    assert torch.equal(kind.native(W, layer), layer.weight)
    x = torch.randn(2, 4, 5, 5)
    assert torch.allclose(kind.op(layer, x, W), F.conv2d(x, layer.weight, groups=2), atol=1e-6)
    back, turned = ConvTranspose(1), nn.ConvTranspose1d(4, 6, 3)
    assert torch.equal(back.native(back.read(turned), turned), turned.weight) and back.read(turned).shape[0] == 6
