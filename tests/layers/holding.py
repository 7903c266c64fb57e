"""What the tests of layer kinds share: a holder of one adapted layer, and its deltas.

Where no golden file says it, the expected output comes from a plain torch module whose weight the test changed by s·B A.
"""

from __future__ import annotations

import copy

import torch

from peft import LoraConfig, get_peft_model
from tests.helpers.layer_kind_cases import Holder


def lora(targets=("site",), **fields):
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": list(targets), **fields})


def adapted(layer, targets=("site",), seed=3, wrap=Holder, **fields):
    """A randomised LoRA on a copy of the layer, so that the original stays a plain module to compare with."""
    torch.manual_seed(seed)
    model = get_peft_model(wrap(copy.deepcopy(layer)), lora(targets, **fields)).eval()
    shake(model)
    return model


def shake(model, size=0.3):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * size)


def deltas(model):
    """Each site as upstream writes it to disk -> s·B A, from the adapter's own tensors."""
    with torch.no_grad():
        return {path: 2.0 * m.lora_B_weight @ m.lora_A_weight for path, m in model.roster.adapters["default"].methods}


def close(a, b, tolerance=1e-5):
    return float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))
