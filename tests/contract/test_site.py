"""What a method sees of its place: room for parameters, and the layer's own geometry with other matrices."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from peft.contract.geometry import Geometry
from peft.contract.site import Op, Site
from peft.layers.conv import Conv


def site(device: str) -> Site:
    return Site("a.b", Geometry(2, 3, 3), lambda: torch.zeros(2, 3), dict, dict, torch.device(device), torch.float64)


def test_room_has_the_sites_shape_dtype_and_device():
    real, meta = site("cpu").empty(4, 2), site("meta").empty(4, 2)
    for p in (real, meta):
        assert isinstance(p, nn.Parameter) and p.requires_grad and p.shape == (4, 2) and p.dtype is torch.float64
    assert real.device.type == "cpu" and meta.is_meta
    assert site("meta").empty(4, 2) is not meta, "parameters of one shape are objects of their own"


def test_another_matrix_runs_through_the_layers_geometry_and_vectors_act_on_channels():
    kind, layer = Conv(2), nn.Conv2d(3, 5, 3, stride=2, padding=1)
    op = Op(kind, layer, kind.geometry(layer))
    x, matrix = torch.randn(2, 3, 7, 6), torch.randn(4, 3 * 9)
    assert torch.allclose(op(x, matrix), F.conv2d(x, matrix.view(4, 3, 3, 3), stride=2, padding=1), atol=1e-5)
    y, v = torch.randn(2, 5, 4, 3), torch.randn(5)
    assert torch.equal(op.scale(y, v), y * v[:, None, None])
    assert torch.equal(op.shift(y, v), y + v[:, None, None])
    h, mix = torch.randn(2, 4, 4, 3), torch.randn(5, 4)
    assert torch.allclose(op.pointwise(h, mix), torch.einsum("oc,bchw->bohw", mix, h), atol=1e-5)
    assert torch.equal(op.read(), layer.weight.flatten(1)) and op.bias() is layer.bias
