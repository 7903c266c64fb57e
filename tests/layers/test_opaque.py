"""Modules of any kind, by what they give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import BottleneckConfig, get_peft_model
from peft.core.anatomy.walk import kind_of
from peft.layers.opaque import Opaque
from tests.helpers.activation import MODELS, base, inputs, on_layer, only
from tests.helpers.cells import randomise


@pytest.mark.parametrize("name", [*MODELS, "mixtral"])
def test_widths_of_blocks_are_what_they_give(name):
    """Every block with parameters, by running the model and looking at what goes in and out."""
    model, seen = base(name), {}

    def look(path):
        def hook(module, args, kwargs, out):
            x = args[0] if args else next(iter(kwargs.values()))
            y = out[0] if isinstance(out, (tuple, list)) else out
            seen[path] = (module, x, y)

        return hook

    for path, module in model.named_modules():
        if path:
            module.register_forward_hook(look(path), with_kwargs=True)
    model(**inputs(name))
    checked = 0
    for path, (module, x, y) in seen.items():
        kind = kind_of(module)
        if not isinstance(kind, Opaque) or not torch.is_tensor(y) or not list(module.parameters()):
            continue
        g = kind.geometry(module)
        assert g.out == y.shape[-1], (path, type(module).__name__)
        if torch.is_tensor(x) and x.is_floating_point() and g.kernel == 1 and not g.indexed:
            assert g.inputs == x.shape[-1], (path, type(module).__name__)
        checked += 1
    assert checked > 5


def test_maps_have_their_channels_second():
    stage = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
    model, m = on_layer(stage, BottleneckConfig(target_modules=["site"], bottleneck_size=2))
    x = torch.randn(2, 3, 6, 6)  # as wide as it has channels: the wrong axis would not show in the shape
    y = stage(x).permute(0, 2, 3, 1)
    z = torch.relu(y @ m.adapter_down_weight.T + m.adapter_down_bias) @ m.adapter_up_weight.T + m.adapter_up_bias
    assert torch.allclose(model(x), (y + z).permute(0, 3, 1, 2), atol=1e-5)


def test_recurrent_layers_give_tuples():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(8, 6, batch_first=True, bidirectional=True), nn.Linear(12, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    model = get_peft_model(Sequence(), BottleneckConfig(target_modules=["rnn"], bottleneck_size=2))
    randomise(model, "default", 1)
    x = torch.randn(2, 5, 8)
    m = only(model)
    h = model.get_base_model().rnn.base_layer(x)[0]
    z = torch.relu(h @ m.adapter_down_weight.T + m.adapter_down_bias) @ m.adapter_up_weight.T + m.adapter_up_bias
    assert torch.allclose(model(x), model.get_base_model().head(h + z), atol=1e-5)
