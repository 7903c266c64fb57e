"""Weights that FSDP 2, tensor parallelism or ZeRO-3 manage, in one process; several are in tests/clients.

Expected values are those of the same model that nobody manages.
"""

from __future__ import annotations

import sys
import types
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn

from peft import (
    BOFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    Refusal,
    get_peft_model,
)
from peft.contract import managed
from tests.helpers.tiny_llama import llama, logits

HERE = {"target_modules": ["q_proj", "lm_head"], "seed": 1}
CONFIGS = {
    "lora": lambda: LoraConfig(r=4, init_lora_weights=False, **HERE),
    "dora": lambda: LoraConfig(r=4, init_lora_weights=False, use_dora=True, **HERE),
    "pissa": lambda: LoraConfig(r=4, init_lora_weights="pissa", **HERE),
    "head": lambda: LoraConfig(r=4, init_lora_weights=False, modules_to_save=["lm_head"], target_modules=["q_proj"]),
    "tokens": lambda: LoraConfig(
        r=4, init_lora_weights=False, target_modules=["q_proj"], trainable_token_indices=[1, 2]
    ),
    "oft": lambda: OFTConfig(oft_block_size=4, init_weights=False, **HERE),
    "boft": lambda: BOFTConfig(boft_block_size=4, init_weights=False, **HERE),
    "hra": lambda: HRAConfig(r=4, init_weights=False, **HERE),
    "loha": lambda: LoHaConfig(r=4, init_weights=False, **HERE),
    "ia3": lambda: IA3Config(feedforward_modules=[], init_ia3_weights=False, **HERE),
    "parameter": lambda: LoraConfig(
        r=4, init_lora_weights=False, target_parameters=["q_proj.weight"], target_modules=[]
    ),
}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    from torch.distributed.device_mesh import init_device_mesh

    where = tmp_path_factory.mktemp("group") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{where}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def jitter(model: nn.Module) -> nn.Module:
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=rng) * 0.1)
    return model.eval()


def fully_sharded(model: nn.Module, mesh) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def replicated(model: nn.Module, mesh) -> nn.Module:
    pytest.importorskip("torch.distributed._composable.replicate_with_fsdp")
    from torch.distributed._composable.replicate_with_fsdp import replicate

    return replicate(model, mesh=mesh)


@pytest.mark.parametrize("first", ["adapters", "shards"])
@pytest.mark.parametrize("which", CONFIGS)
def test_merging_into_pieces_is_merging(which, first, mesh):
    """Also after a forward, which leaves whole weights behind that are dropped later."""
    torch.manual_seed(5)  # for the configs without a seed
    expected = logits(plain := jitter(get_peft_model(llama(), CONFIGS[which]())))
    torch.manual_seed(5)
    if first == "adapters":
        model = fully_sharded(jitter(get_peft_model(llama(), CONFIGS[which]())), mesh)
    else:
        model = jitter(get_peft_model(fully_sharded(llama(), mesh), CONFIGS[which]()))
    model.merge_adapter()
    assert (logits(model) - expected).abs().max() < 2e-5
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    assert torch.allclose(logits(model), expected, atol=1e-6)
    base = model.merge_and_unload()
    assert (logits(base) - expected).abs().max() < 2e-5 and (expected - logits(llama())).abs().max() > 1e-3
    assert (logits(base) - logits(plain.merge_and_unload())).abs().max() < 2e-5, "and again"


def test_replicas_are_written_too(mesh):
    expected = logits(jitter(get_peft_model(llama(), CONFIGS["lora"]())))
    model = replicated(jitter(get_peft_model(llama(), CONFIGS["lora"]())), mesh)
    logits(model)
    model.merge_adapter()
    assert (logits(model) - expected).abs().max() < 2e-5 and (logits(model) - logits(llama())).abs().max() > 1e-3


def test_what_is_left_trains_when_the_sharded_wrapper_is_taken_off(mesh):
    plain = get_peft_model(llama(), CONFIGS["lora"]()).merge_and_unload().requires_grad_(True)
    base = fully_sharded(get_peft_model(llama(), CONFIGS["lora"]()), mesh).merge_and_unload().requires_grad_(True)
    ids = torch.arange(8).reshape(1, 8)
    for model in (plain, base):
        model(input_ids=ids, labels=ids).loss.backward()
    gradients = {n: p.grad for n, p in plain.named_parameters()}
    found = {n: p.grad.full_tensor() for n, p in base.named_parameters()}
    assert found.keys() == gradients.keys()
    assert all((found[n] - g).abs().max() < 1e-6 for n, g in gradients.items())


def test_tied_weights_in_pieces_are_refused_before_anything_changes(mesh):
    model = get_peft_model(llama(tie_word_embeddings=True), CONFIGS["lora"]())
    fully_sharded(model, mesh)
    before = {n: p.full_tensor().clone() for n, p in model.named_parameters()}
    with pytest.raises(Refusal, match="lm_head.*untie it before sharding"):
        model.merge_adapter()
    managed.settle(model.modules())
    assert all(torch.equal(p.full_tensor(), before[n]) for n, p in model.named_parameters())


# -- ZeRO-3 -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def zero3(monkeypatch):
    """What of deepspeed is used: parameters that are empty outside of a context that gathers them."""

    @contextmanager
    def gathered(params, modifier_rank=None):
        for p in params:
            p.data = p.ds_tensor.clone()
        yield
        for p in params:
            if modifier_rank is not None:
                p.ds_tensor = p.data.clone()
            p.data = torch.empty(0, dtype=p.dtype)

    module = types.ModuleType("deepspeed")
    module.zero = types.SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", module)

    def partition(model: nn.Module) -> nn.Module:
        for i, p in enumerate(model.parameters()):
            p.ds_id, p.ds_tensor = i, p.data.clone()
            p.data = torch.empty(0, dtype=p.dtype)
        return model

    return partition


@pytest.mark.parametrize("which", ["lora", "dora", "head", "oft"])
def test_placeholders_are_gathered_for_saving_and_merging(which, zero3, tmp_path):
    plain = jitter(get_peft_model(llama(), CONFIGS[which]()))
    model = zero3(jitter(get_peft_model(llama(), CONFIGS[which]())))
    for m, folder in ((plain, "plain"), (model, "zero3")):
        m.save_pretrained(tmp_path / folder)
    files = [(tmp_path / f / "adapter_model.safetensors").read_bytes() for f in ("plain", "zero3")]
    assert files[0] == files[1]
    before = {n: p.ds_tensor.clone() for n, p in model.named_parameters()}
    for m in (plain, model):
        m.merge_adapter()
    assert all(p.numel() == 0 for p in model.parameters())
    for (n, p), (_, q) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert torch.allclose(p, q.ds_tensor, atol=1e-6), n
    assert any(not torch.equal(p.ds_tensor, before[n]) for n, p in model.named_parameters())
    model.unmerge_adapter()
    assert all(torch.equal(p.ds_tensor, before[n]) for n, p in model.named_parameters())
