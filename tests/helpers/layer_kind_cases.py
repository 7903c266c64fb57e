"""The layers of tests/layers/test_upstream_files.py that upstream knows, too; imported by golden/layer_kinds/make.py."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class Holder(nn.Module):
    """A model of one layer; attention attends to its own input."""

    def __init__(self, layer):
        super().__init__()
        self.site = layer

    def forward(self, x):
        return self.site(x, x, x)[0] if hasattr(self.site, "num_heads") else self.site(x)


class Scaled(nn.Embedding):
    """Gemma's way: the scale is a tensor, cast to the weight's dtype."""

    def __init__(self, *args, scale):
        super().__init__(*args)
        self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)

    def forward(self, input):
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)


def tokens():
    return torch.arange(10).view(2, 5)


CASES = {
    "embedding": (lambda: nn.Embedding(10, 8, padding_idx=1), tokens),
    "scaled": (lambda: Scaled(10, 8, 0, scale=3.0), tokens),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=1), lambda: torch.randn(2, 4, 7, 5)),
    "conv3d": (lambda: nn.Conv3d(3, 5, 2), lambda: torch.randn(2, 3, 4, 4, 3)),
    "gpt2_conv1d": (lambda: Conv1D(12, 8), lambda: torch.randn(2, 3, 8)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 5, 5)),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), lambda: torch.randn(2, 3, 8)),
}
