"""Bases of dtypes that torch knows beside the usual ones: each method is right on them, or refused by name before anything
changes. fp64, fp16 and bf16 are rows of tests/laws/test_laws.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft import LoraConfig, PeftModel, Refusal, get_peft_model, registry
from tests.helpers.cells import Cell, Net, close, randomise, refusal

LINEAR = [
    Cell(n, dict(c), "linear", "bias") for n, m in registry.methods().items() if m.form != "prompt" for c in m.examples
]
BUILT = [c for c in LINEAR if refusal(c) is None]
law = pytest.mark.parametrize("cell", BUILT, ids=[c.id for c in BUILT])
TERMS = {"LORA", "ADALORA", "LOHA", "LOKR", "VERA", "KRONA"}  # that start without a look at W


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@law
def test_complex_bases(cell, dtype, tmp_path):
    """ΔW is complex as W is. The merged layer equals the forward, whose change equals ΔW x, and files hold all of it."""
    torch.manual_seed(0)
    base, x = Net(nn.Linear(16, 24, dtype=dtype)), torch.randn(4, 16, dtype=dtype)
    config = cell.peft_config()
    dropout = any(v for k, v in cell.config.items() if k in ("lora_dropout", "vera_dropout", "krona_dropout"))
    looks = cell.config.get("init_lora_weights") in ("pissa", "olora")
    if cell.method not in TERMS or cell.config.get("use_dora") or looks or dropout:
        before = {k: v.clone() for k, v in base.state_dict().items()}
        with pytest.raises(Refusal, match="complex"):
            get_peft_model(base, config)
        assert type(base.site) is nn.Linear and all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
        return
    twin, plain = copy.deepcopy(base), copy.deepcopy(base)
    model = get_peft_model(base, config)
    own = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == dtype and not p.imag.any() for p in own), "they start from the real numbers of a real layer"
    if registry.methods()[cell.method].identity:
        assert close_complex(model.eval()(x), plain(x))
    for p in own:
        p.data += 0.3 * torch.randn_like(p)
    y = model.eval()(x)
    method = model.get_base_model().site.methods["default"][0]
    shift = method.bias_change()
    assert close_complex(y - plain(x), x @ method.dense().T + (0 if shift is None else shift))
    y.abs().square().sum().backward()
    assert all(p.grad is not None and p.grad.imag.abs().sum() > 0 for p in own)
    if dtype == torch.complex128:
        with pytest.raises(ValueError, match="safe_serialization=False"):
            model.save_pretrained(tmp_path)
        assert not [*tmp_path.glob("adapter_*")]
    model.save_pretrained(tmp_path, safe_serialization=dtype == torch.complex64)
    loaded = PeftModel.from_pretrained(twin, tmp_path).eval()
    assert all(p.dtype == dtype for p in loaded.adapter_parameters("default"))
    assert close_complex(loaded(x), y)
    weight = model.get_base_model().site.base_layer.weight.detach().clone()
    model.merge_adapter()
    assert close_complex(model(x), y)
    model.unmerge_adapter()
    assert torch.equal(model.get_base_model().site.base_layer.weight, weight)
    assert close_complex(model.merge_and_unload()(x), y)


def close_complex(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


class Upcasts(nn.Linear):
    """Storage in 8 bits, computation in the input's dtype."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@law
def test_float8_storage(cell, dtype):
    """Adapters are trained in fp32 and act as on the same numbers in fp32; a merge, which would round them away, is refused."""
    torch.manual_seed(1)
    stored, wide = Upcasts(16, 24), Upcasts(16, 24)
    stored.weight.data = stored.weight.data.to(dtype)
    wide.load_state_dict({"weight": stored.weight.float(), "bias": stored.bias})
    x, models = torch.randn(4, 16), []
    for layer in (stored, wide):
        try:
            torch.manual_seed(2)
            model = get_peft_model(Net(layer), cell.peft_config())
        except Refusal as e:
            assert len(e.reason) > 15
            return
        randomise(model, "default", 3)
        models.append(model.eval())
    ours, reference = models
    assert all(p.dtype == torch.float32 for p in ours.parameters() if p.requires_grad)
    y = ours(x)
    assert close(y.detach(), reference(x).detach(), 1e-5)
    y.square().sum().backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    for merge in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(Refusal):
            merge()
    assert all(torch.equal(v.float(), before[k].float()) for k, v in ours.state_dict().items())
    assert torch.equal(ours(x), y)


def test_values_of_unusual_dtypes_are_saved(tmp_path):
    """What the library's own writer leaves to safetensors': a module to save with a mask of its own."""

    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer("mask", torch.tensor([True, False, True, True]))

        def forward(self, x):
            return super().forward(x) * self.mask

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), Masked())

    model = get_peft_model(
        net(), LoraConfig(target_modules=["0"], modules_to_save=["1"], init_lora_weights=False)
    ).eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path).eval()(x), model(x))
