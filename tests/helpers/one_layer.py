"""One layer called `site` with an adapter that has an effect."""

from __future__ import annotations

import torch
from torch import nn

from peft import get_peft_model


def adapted(config, layer=None, seed=0, noise=0.3):
    """(model, its one method object) of a randomised adapter on a layer called `site`."""
    torch.manual_seed(seed)
    base = nn.Sequential()
    base.site = layer if layer is not None else nn.Linear(16, 24)
    model = get_peft_model(base, config).eval()
    for p in model.adapter_parameters("default"):
        p.data += noise * torch.randn_like(p)
    (_, method), *_ = model.roster.adapters["default"].methods
    return model, method
