"""What the tests of additive methods share.

golden/additive_methods/<case> are adapters of `Net` (seed 0) that huggingface/peft 0.21.2 wrote; `expected.safetensors`
holds the outputs that it computes with them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from peft import get_peft_model
from peft.core.adapted.layer import adapted_layers

GOLDEN = Path(__file__).parents[1] / "golden" / "additive_methods"

EXPECTED = load_file(GOLDEN / "expected.safetensors")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.conv1 = nn.Conv1d(16, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 8, 3, padding=1)
        self.lin1 = nn.Linear(12, 24)
        self.lin2 = nn.Linear(24, 16)

    def forward(self, ids, img):
        h = self.conv1(self.emb(ids).transpose(1, 2)).transpose(1, 2)
        return self.lin2(torch.tanh(self.lin1(h))), self.conv2(img)


def base(cls=Net):
    torch.manual_seed(0)
    return cls().eval()


def inputs():
    rng = torch.Generator().manual_seed(3)
    return torch.randint(0, 20, (4, 7), generator=rng), torch.randn(2, 3, 6, 6, generator=rng)


def noised(model, seed=5):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=rng) * 0.2)
    return model.eval()


def method(model, path="lin1"):
    """The config's own method at a path."""
    layer = next(layer for layer in adapted_layers(model) if layer.path == path)
    return layer.methods["default"][0].nested()[-1]


def make(config, cls=Net):
    return noised(get_peft_model(base(cls), config))
