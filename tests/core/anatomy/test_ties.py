"""`ensure_weight_tying`: all ends of a tied weight share what is trained. And plain copies of PiSSA adapters, and names
that `all-linear` stands for."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoKrConfig, LoraConfig, PeftModel, Refusal, get_peft_model
from peft.core.anatomy.ties import other_ends, shared_parameters, shared_storages
from peft.core.anatomy.walk import walk

IDS = torch.tensor([[1, 3, 17, 9, 2, 5, 30, 1], [9, 9, 3, 4, 6, 5, 2, 0]])


def llama(tied=True, vocab=40):
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)).eval()


def trained(model, steps=3):
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("vocab", [40, 16], ids=["a table", "a square table"])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens", "q_proj"]])
def test_both_ends_of_a_tied_weight_get_one_delta(targets, vocab, tmp_path):
    ids, base = IDS % vocab, llama(vocab=vocab)
    config = LoraConfig(r=3, target_modules=targets, ensure_weight_tying=True, init_lora_weights=False)
    model = get_peft_model(base, config)
    pairs = [n for n, p in model.named_parameters() if p.requires_grad and "q_proj" not in n]
    assert len(pairs) == 2, "one A and one B for both ends"
    before = model.base_model.model.model.embed_tokens.weight.detach().clone()
    for p in (p for p in model.parameters() if p.requires_grad):
        p.data += 0.2 * torch.randn_like(p)
    with torch.no_grad():
        out = model(ids).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(llama(vocab=vocab), tmp_path).eval()
        assert torch.equal(again(ids).logits, out)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, out, rtol=1e-5, atol=1e-5)
    ends = merged.model.embed_tokens.weight, merged.lm_head.weight
    assert (ends[0] - before).abs().max() > 0.01
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


def test_the_shared_pair_trains_from_both_ends():
    """Its gradient is the sum of those of two separate pairs with the same values."""
    fields = {"r": 2, "target_modules": ["embed_tokens", "lm_head"], "init_lora_weights": False, "seed": 3}
    tied = get_peft_model(llama(), LoraConfig(ensure_weight_tying=True, **fields))
    apart = get_peft_model(llama(), LoraConfig(**fields))
    A, B = (
        dict(tied.roster.adapters["default"].methods)["model.embed_tokens"].get_parameter(n)
        for n in ("lora_A_weight", "lora_B_weight")
    )
    table, head = (dict(apart.roster.adapters["default"].methods)[n] for n in ("model.embed_tokens", "lm_head"))
    table.lora_A_weight.data, table.lora_B_weight.data = A.detach().clone(), B.detach().clone()
    head.lora_A_weight.data, head.lora_B_weight.data = B.detach().T.clone(), A.detach().T.clone()
    assert torch.allclose(logits(tied), logits(apart), atol=1e-6)
    for model in (tied, apart):
        model(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(A.grad, table.lora_A_weight.grad + head.lora_B_weight.grad.T)
    torch.testing.assert_close(B.grad, table.lora_B_weight.grad + head.lora_A_weight.grad.T)


def test_without_it_the_ends_are_apart():
    model = trained(get_peft_model(llama(), LoraConfig(r=2, target_modules=["embed_tokens"])))
    merged = model.merge_and_unload()
    assert not torch.allclose(merged.model.embed_tokens.weight, merged.lm_head.weight, atol=1e-3)


def test_a_start_from_each_ends_own_weight_is_refused():
    base = llama()
    config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True, init_lora_weights="pissa")
    with pytest.raises(Refusal, match="ensure_weight_tying"):
        get_peft_model(base, config)
    assert not any("lora" in n for n, _ in base.named_parameters())


def test_saved_modules_share_the_copy_of_a_tied_weight(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = trained(get_peft_model(llama(), config))
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    table, head = (keys[f"base_model.model.{n}.weight"] for n in ("model.embed_tokens", "lm_head"))
    assert torch.equal(table, head) and not torch.equal(table, llama().lm_head.weight)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    out, merged = logits(model), model.merge_and_unload()
    assert torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    torch.testing.assert_close(logits(merged), out, rtol=0, atol=1e-5)


def test_token_rows_of_tied_ends_must_agree():
    indices = {"embed_tokens": [1, 2], "lm_head": [3]}
    for tying in (True, False):
        config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=indices, ensure_weight_tying=tying)
        if tying:
            with pytest.raises(ValueError, match="ensure_weight_tying"):
                get_peft_model(llama(), config)
        else:
            get_peft_model(llama(), config)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_starts_from_the_weights_is_saved_as_a_plain_one(start, tmp_path):
    fields = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": start}
    model = trained(get_peft_model(llama(False), LoraConfig(**fields, modules_to_save=["lm_head"])))
    out, names = logits(model), [n for n, _ in model.named_parameters()]
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="anywhere")
    assert [n for n, _ in model.named_parameters()] == names and torch.equal(logits(model), out)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True and saved["r"] == 4
    tensors, base = load_file(tmp_path / "adapter_model.safetensors"), llama(False)
    with torch.no_grad():  # by the plain formula, with no adapter
        for path in {k.rsplit(".lora_", 1)[0] for k in tensors if ".lora_" in k}:
            A, B = (tensors[f"{path}.lora_{x}.weight"] for x in "AB")
            base.get_submodule(path.removeprefix("base_model.model.")).weight += (
                saved["lora_alpha"] / saved["r"] * B @ A
            )
        base.lm_head.weight.copy_(tensors["base_model.model.lm_head.weight"])
    torch.testing.assert_close(logits(base), out, rtol=0, atol=1e-5)


def test_all_linear_is_written_out(tmp_path):
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    attention = ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert saved == sorted([*attention, "down_proj", "gate_proj", "up_proj"])
    fewer = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear", layers_to_transform=[1]))
    assert all(".layers.1." in f".{t}." for t in fewer.peft_config["default"].target_modules)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "lm_head"]])
def test_methods_that_cannot_share_refuse(targets):
    with pytest.raises(Refusal, match="ensure_weight_tying"):
        get_peft_model(llama(), LoKrConfig(r=1, target_modules=targets, ensure_weight_tying=True))
    get_peft_model(llama(), LoKrConfig(r=1, target_modules=["q_proj"], ensure_weight_tying=True))
    get_peft_model(llama(False), LoKrConfig(r=1, target_modules=targets, ensure_weight_tying=True))


def test_tied_parameters_and_views_of_one_buffer_are_found():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    assert shared_parameters(net) == {id(net[0].weight)}
    assert [p.path for p in other_ends(net, [p for p in walk(net) if p.path == "0"])] == ["2"]
    assert shared_storages(net) == {net[0].weight.data_ptr()}
    net[1].weight = nn.Parameter(net[0].weight.data.view(3, 3))
    assert shared_parameters(net) == {id(net[0].weight)}, "a view is another parameter"
    net[2].weight = nn.Parameter(torch.zeros(3, 3))
    assert shared_parameters(net) == set() and shared_storages(net) == {net[0].weight.data_ptr()}
