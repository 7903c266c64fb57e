"""Float8 codes with scales: the merged weight is what they stand for, and the change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import LoraConfig, Refusal, dry_run, get_peft_model
from peft.layers.fp8_linear import Float8
from tests.layers.holding import deltas, shake

fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
compressed = pytest.importorskip("transformers.integrations.compressed_tensors")


def filled(layer):
    torch.manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape))
        for name, p in layer.named_parameters():
            if "scale" in name or name == "bias":
                p.copy_(torch.rand(p.shape) + 0.5)
    return layer.requires_grad_(False)


def by_hand(layer):
    """code · scale, entry by entry."""
    codes = layer.weight.float()
    out = torch.empty_like(codes)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            if hasattr(layer, "weight_scale"):
                s = layer.weight_scale[0, i]
            elif layer.block_size is None:
                s = layer.weight_scale_inv
            else:
                s = layer.weight_scale_inv[i // layer.block_size[0], j // layer.block_size[1]]
            out[i, j] = codes[i, j] * s
    return out


LAYERS = {
    "blocks": lambda: fp8.FP8Linear(32, 16, block_size=(8, 16)),
    "blocks that do not divide": lambda: fp8.FP8Linear(20, 10, block_size=(8, 16), has_bias=True),
    "one scale": lambda: fp8.FP8Linear(32, 16),
    "rows": lambda: compressed.CompressedTensorsFP8Linear(32, 16),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_merged_weight_is_the_decoded_one_and_the_change(name):
    layer = filled(LAYERS[name]())
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], r=2, lora_alpha=4))
    shake(model)
    W = by_hand(layer) + deltas(model)["0"]
    merged = model.merge_and_unload()[0]
    assert type(merged) is nn.Linear and merged.weight.dtype == torch.float32
    assert torch.allclose(merged.weight, W, atol=1e-6)
    assert (merged.bias is None) == (layer.bias is None)


def test_a_layer_that_runs_here_runs_as_it_is_with_the_adapter_beside_it():
    layer, x = filled(compressed.CompressedTensorsFP8Linear(32, 16)), torch.randn(3, 32, dtype=torch.bfloat16)
    try:
        expected = layer(x)
    except (RuntimeError, NotImplementedError) as e:
        pytest.skip(f"no float8 product here: {e}")
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], r=2, lora_alpha=4))
    assert torch.equal(model(x), expected)
    shake(model)
    with torch.no_grad():
        change = x.float() @ deltas(model)["0"].T
        assert torch.allclose(model(x).float(), expected.float() + change, rtol=0.05, atol=0.1)


def test_grouped_products_of_codes_are_refused_by_name_and_passed_over():
    net = nn.Sequential(filled(fp8.FP8GroupedLinear(32, 16, 2, block_size=(8, 16))), nn.Linear(8, 8))
    with pytest.raises(Refusal, match="FP8GroupedLinear"):
        get_peft_model(net, LoraConfig(target_modules=["0"]))
    assert "float8" in dry_run(net, LoraConfig(target_modules="all-linear")).passed_over["0"]


def test_codes_two_a_byte_are_not_taken():
    layer = fp8.FP8Linear(32, 16)
    layer.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    assert not Float8().claims(layer) and Float8().claims(fp8.FP8Linear(32, 16))
