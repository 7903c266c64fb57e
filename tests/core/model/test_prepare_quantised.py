"""QLoRA end to end, and what preparing a model casts."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model
from peft.core.model.prepare_quantised import prepare_model_for_kbit_training

pytest.importorskip("bitsandbytes")


def load(path, bits: int):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu", dtype=torch.float32
    )


def test_no_garbage_is_collected(monkeypatch):
    """What it frees is in no cycle, and walking all objects of a process takes longer than the rest."""
    monkeypatch.setattr(gc, "collect", lambda *_: pytest.fail("a garbage collection"))
    model = prepare_model_for_kbit_training(nn.Sequential(nn.Linear(2, 2)), use_gradient_checkpointing=False)
    assert not any(p.requires_grad for p in model.parameters())


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
