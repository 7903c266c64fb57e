"""bitsandbytes: weights read from codes by the published formulas, to the bit."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from peft import LoraConfig, Refusal, get_peft_model
from peft.core.anatomy.walk import kind_of
from peft.layers.bitsandbytes_4bit import FourBit
from peft.layers.bitsandbytes_8bit import EightBit

bnb = pytest.importorskip("bitsandbytes")


def four_bit(nested: bool, dtype: torch.dtype = torch.float32, bias: bool = True, kind: str = "nf4"):
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 32, bias=bias, compute_dtype=dtype, compress_statistics=nested, quant_type=kind)
    layer.load_state_dict(nn.Linear(64, 32, bias=bias).to(dtype).state_dict())
    return layer.to(dtype).to("cpu").eval()


def expected(layer) -> torch.Tensor:
    """W of a 4-bit layer that never ran, by its definition: table[code] times absmax, block by block."""
    state = layer.weight.quant_state
    absmax = state.absmax
    if state.nested:
        inner = state.state2
        steps = inner.absmax.repeat_interleave(inner.blocksize)[: absmax.numel()]
        absmax = inner.code[absmax.long()] * steps + state.offset
    raw = layer.weight.data.flatten().long()
    codes = torch.stack([raw >> 4, raw & 15], 1).flatten()
    W = state.code[codes].reshape(-1, state.blocksize) * absmax.float()[:, None]
    return W.reshape(state.shape)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bit_weights_read_the_same_before_and_after_the_first_forward(nested, kind):
    layer = four_bit(nested, kind=kind)
    W = expected(layer)
    fourbit = kind_of(layer)
    assert torch.allclose(fourbit.read(layer), W, atol=1e-6)
    x = torch.randn(3, 64)
    with torch.no_grad():
        fourbit.run(layer, x)
        packed = getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        if bnb.functional.has_avx512bf16():
            assert packed, "this CPU repacks: the test would show nothing otherwise"
        assert torch.allclose(fourbit.read(layer), W, atol=1e-6)
        layer.state_dict()  # the library's way back, which leaves absmax transposed or coded again
        assert torch.allclose(fourbit.read(layer), W, atol=1e-6)
        assert torch.allclose(fourbit.run(layer, x), x @ W.T + layer.bias, atol=2e-2)
        assert torch.allclose(fourbit.read(copy.deepcopy(layer)), W, atol=1e-6)


def test_a_layer_that_was_packed_before_adapters_came_is_read_to_bf16_scales():
    layer = four_bit(False)
    W = expected(layer)
    with torch.no_grad():
        layer(torch.randn(3, 64))
    assert torch.allclose(kind_of(layer).read(layer), W, atol=2**-8 * float(W.abs().max()))


def test_training_after_evaluation_gets_gradients_through_a_packed_layer():
    layer = four_bit(False, bias=False)
    W = expected(layer)
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], r=2))
    x = torch.randn(3, 64)
    with torch.no_grad():
        model.eval()(x)
    x.requires_grad_()
    model.train()(x).sum().backward()
    assert torch.allclose(x.grad, W.sum(0).expand_as(x), atol=1e-5)  # B starts at 0


def test_eight_bit_weights_are_codes_times_scales():
    torch.manual_seed(0)
    plain = nn.Linear(16, 24)
    layer = bnb.nn.Linear8bitLt(16, 24, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cpu")
    kind = kind_of(layer)
    W = plain.weight.detach().half().float()  # the library codes from fp16
    step = W.abs().amax(1, keepdim=True) / 127
    steps = kind.read(layer) / step
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    assert bool(((kind.read(layer) - W).abs() <= 0.51 * step).all())
    before = kind.read(layer)
    with torch.no_grad():
        layer(torch.randn(3, 16))
    assert torch.equal(kind.read(layer), before)


def test_merged_weights_have_the_dtype_of_the_model():
    for layer in (four_bit(False, torch.bfloat16), _eight(torch.bfloat16)):
        net = nn.Sequential(nn.LayerNorm(64, dtype=torch.bfloat16), layer)
        m = get_peft_model(net, LoraConfig(target_modules=["1"], r=2)).eval()
        x = torch.randn(3, 64, dtype=torch.bfloat16)
        with torch.no_grad():
            m(x)
            merged = m.merge_and_unload()
            assert merged[1].weight.dtype == torch.bfloat16 and merged(x).dtype == torch.bfloat16


def _eight(dtype):
    layer = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    layer.load_state_dict(nn.Linear(64, 32, bias=False).to(dtype).state_dict())
    return layer.to("cpu")


def test_codes_are_no_bare_parameters():
    net = nn.Sequential(_eight(torch.float32))
    with pytest.raises(Refusal, match="codes"):
        get_peft_model(net, LoraConfig(target_modules=[], target_parameters=["0.weight"]))


def test_importing_the_library_imports_no_quantisation():
    code = (
        "import sys, torch, peft; net = torch.nn.Sequential(torch.nn.Linear(4, 4));"
        "peft.get_peft_model(net, peft.LoraConfig(target_modules=['0']));"
        "assert 'bitsandbytes' not in sys.modules and 'torchao.quantization' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_format_has_its_kind_and_incomplete_codes_are_told():
    coded = FourBit().examples()
    assert coded and all(isinstance(kind_of(make()[0]), FourBit) for make in coded.values())
    layer, _ = EightBit().examples()["bias"]()
    assert isinstance(kind_of(layer), EightBit) and EightBit().decode(layer).shape == (24, 16)
    layer.state.CB, layer.state.SCB, layer.weight.SCB = None, None, None
    with pytest.raises(ValueError, match="codes but no scales"):
        EightBit().decode(layer)
