"""Quantised bases for real, on the CPU: what is read, merged, coded again and trained is what the format says.

The laws run every method on these kinds; here stand the formats' own pitfalls and the QLoRA job end to end.
"""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import nn

from peft import (
    LoraConfig,
    PeftModel,
    Refusal,
    get_peft_model,
    prepare_model_for_kbit_training,
    registry,
)
from peft.core.anatomy.walk import kind_of
from tests.helpers.cells import same_bits

bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")


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
        assert torch.allclose(merged[0].weight, W + lora.lora_B @ lora.lora_A * lora.scaling, atol=1e-6)
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


# -- QLoRA, end to end ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(path, bits: int):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu", dtype=torch.float32
    )


def size(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_trains_saves_loads_and_merges(tiny_llama, tmp_path, bits):
    model = load(tiny_llama, bits)
    before, dtypes = size(model), [p.dtype for p in model.parameters()]
    model = prepare_model_for_kbit_training(model)
    assert size(model) == before and [p.dtype for p in model.parameters()] == dtypes  # 0 bytes added
    assert not any(p.requires_grad for p in model.parameters()) and model.is_gradient_checkpointing
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    adapter = sum(p.numel() for p in model.adapter_parameters("default"))
    assert size(model) == before + 4 * adapter
    ids = torch.arange(20).reshape(2, 10)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        model.train()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for p in model.adapter_parameters("default"))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        model.eval()
        with torch.no_grad():
            model(input_ids=ids)  # evaluation between steps: 4-bit layers must still have a backward
    assert losses[-1] < losses[0]
    with torch.no_grad():
        out = model(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(prepare_model_for_kbit_training(load(tiny_llama, bits)), tmp_path).eval()
        assert torch.allclose(again(input_ids=ids).logits, out, atol=1e-5)
        merged = again.merge_and_unload()
        linear = merged.model.layers[0].self_attn.q_proj
        assert type(linear) is nn.Linear and linear.weight.dtype == torch.float32
        assert torch.allclose(merged(input_ids=ids).logits, out, atol=3e-2 * float(out.abs().max()))


def test_preparation_casts_nothing_of_a_half_precision_model(tiny_llama):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    before = size(model)
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert size(model) == before and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    out = model.get_input_embeddings()(torch.tensor([[1, 2]]))
    assert out.requires_grad
    assert not prepare_model_for_kbit_training(
        AutoModelForCausalLM.from_pretrained(tiny_llama), use_gradient_checkpointing=False
    ).is_gradient_checkpointing


def test_torchao_models_of_transformers_save_after_the_adapter_is_taken_out(tiny_llama, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    def base():
        return AutoModelForCausalLM.from_pretrained(
            tiny_llama, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), device_map="cpu"
        )

    ids = torch.arange(20).reshape(2, 10)
    model = get_peft_model(base(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    with torch.no_grad():
        out = model(input_ids=ids).logits
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
        assert torch.equal(again(input_ids=ids).logits, out)
        assert torch.equal(copy.deepcopy(again)(input_ids=ids).logits, out)
        file = io.BytesIO()
        torch.save(again.state_dict(), file)
        back = again.unload()
        back.save_pretrained(tmp_path / "base")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu")
        original = base().state_dict()
        for name, value in reloaded.state_dict().items():
            assert same_bits(value, original[name]), name
