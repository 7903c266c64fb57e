"""Merging into coded weights and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model, registry
from peft.layers.coded import Quantised

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

QUANTISED = [
    pytest.param(kind, example, id=f"{name}-{example}")
    for name, kind in registry.kinds().items()
    if name.startswith(("bitsandbytes", "torchao"))
    for example in kind.examples()
]


@pytest.mark.parametrize(("kind", "example"), QUANTISED)
def test_merging_dequantises_and_requantising_reports_its_error(kind, example):
    def model():
        torch.manual_seed(1)
        layer, x = kind.examples()[example]()[:2]
        m = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
        return m.eval(), x

    with torch.no_grad():
        m, x = model()
        live = m(x)
        base = m.get_base_model()[0].base_layer
        W = kind.read(base)
        lora = m.get_base_model()[0].methods["default"][0]
        merged = m.merge_and_unload()
        assert type(merged[0]) is nn.Linear and type(merged[0].weight.data) is torch.Tensor
        assert torch.allclose(merged[0].weight, W + lora.lora_B_weight @ lora.lora_A_weight * lora.strength, atol=1e-6)
        assert not hasattr(merged, "requantization_error")
        m, x = model()
        coded = m.merge_and_unload(requantize=True)
        assert kind.claims(coded[0])
        difference = float((kind.read(coded[0]) - merged[0].weight).abs().max())
        assert coded.requantization_error == {"0": pytest.approx(difference, abs=1e-6)} and difference > 0
        assert torch.allclose(coded(x), live, atol=0.5 * float(live.abs().max()))
        assert type(kind.read(coded[0])) is torch.Tensor


@pytest.mark.parametrize(("kind", "example"), QUANTISED)
def test_unmerging_keeps_the_very_codes(kind, example):
    torch.manual_seed(1)
    layer, x = kind.examples()[example]()[:2]
    m = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)).eval()
    with torch.no_grad():
        out = m(x)
        site = m.get_base_model()[0]
        for _ in range(3):
            m.merge_adapter()
            assert site.base_layer is not layer
            m.unmerge_adapter()
        assert site.base_layer is layer and torch.equal(m(x), out)


@pytest.mark.parametrize(("kind", "example"), QUANTISED)
def test_a_written_layer_is_another_and_the_coded_one_stays(kind, example):
    assert isinstance(kind, Quantised)
    layer, _ = kind.examples()[example]()[:2]
    W = kind.read(layer).clone()
    made = kind.write(layer, {"weight": W + 1})
    assert type(made) is nn.Linear and made is not layer and not made.weight.requires_grad
    assert torch.equal(made.weight, (W + 1).to(made.weight.dtype)) and torch.equal(kind.read(layer), W)
    assert torch.equal(kind.read(made), made.weight), "the kind reads the plain layer, too"
    coded, error = kind.requantize(layer, made)
    assert kind.claims(coded) and error == float((kind.read(coded).float() - made.weight.float()).abs().max())
