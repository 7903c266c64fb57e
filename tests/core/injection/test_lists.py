"""Modules that a model calls from a plain list of its own, as Mask2Former's prediction heads do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft import get_peft_model
from tests.layers.holding import close, lora, shake


class Listed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        parts = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)]
        for i, part in enumerate(parts):
            self.add_module(str(i), part)
        self.held = {"list": parts, "tuple": tuple(parts), "dict": dict(enumerate(parts))}[kind]

    def forward(self, x):
        for part in self.held.values() if isinstance(self.held, dict) else self.held:
            x = part(x)
        return x


@pytest.mark.parametrize("kind", ["list", "tuple", "dict"])
def test_what_is_called_from_a_plain_container_is_adapted_and_comes_back(kind):
    torch.manual_seed(0)
    base = Listed(kind)
    parts, x = list(base._modules.values()), torch.randn(3, 8)
    with torch.no_grad():
        expected = base(x)
    model = get_peft_model(base, lora(("0", "2")))
    model.add_adapter("other", lora(("0",)))
    shake(model)
    out = model(x)
    out.square().sum().backward()
    trained = [p for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    with torch.no_grad():
        assert not close(out, expected)
        assert close(copy.deepcopy(model)(x), out)
        with model.disable_adapter():
            assert torch.equal(model(x), expected)
        assert close(copy.deepcopy(model).merge_and_unload()(x), out)
        plain = model.unload()
        assert torch.equal(plain(x), expected)
    held = list(plain.held.values()) if kind == "dict" else list(plain.held)
    assert all(a is b for a, b in zip(held, parts, strict=True))


def test_attention_in_a_list():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
            self.held = [self.attn]

        def forward(self, x):
            return self.held[0](x, x, x)[0]

    model, x = get_peft_model(Net(), lora(("attn",))), torch.randn(2, 3, 8)
    with torch.no_grad():
        before = model(x)
        shake(model)
        out = model(x)
        assert not close(out, before) and close(model.merge_and_unload()(x), out)
