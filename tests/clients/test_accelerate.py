"""accelerate with adapters: training, states, weights kept on the CPU or the disk, and several processes.

Expected values come from the same model without accelerate, or from one process on the whole batch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peft
from peft import (
    BOFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)

accelerate = pytest.importorskip("accelerate")
IDS = torch.arange(24).reshape(4, 6)
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def llama(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 2, "num_hidden_layers": 2, "attention_bias": True, **more}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def lora(**more) -> LoraConfig:
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, "seed": 7}
    return LoraConfig(**{**config, **more})


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


ROUNDING = 1e-6  # products beside weights that are here are summed in another order than beside those elsewhere


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture
def cpu():
    """Makes accelerators on the CPU, each as in a process of its own."""
    from accelerate.state import AcceleratorState, GradientState

    def fresh(**more):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return accelerate.Accelerator(cpu=True, **more)

    yield fresh
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# -- training and states ------------------------------------------------------------------------------------------------------------
def train(accelerator, model, optimizer, loader, steps):
    model.train()
    done = 0
    while done < steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=batch, labels=batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            done += 1
            if done == steps:
                break


def prepared(accelerator, config, batch=4):
    model = get_peft_model(llama(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return accelerator.prepare(model, optimizer, DataLoader(list(IDS), batch_size=batch))


CONFIGS = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "head": lambda: lora(modules_to_save=["lm_head"]),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, seed=7),
}


@pytest.mark.parametrize("which", CONFIGS)
def test_a_saved_state_continues_with_the_same_bits(which, cpu, tmp_path):
    accelerator = cpu()
    model, optimizer, loader = prepared(accelerator, CONFIGS[which]())
    start = get_peft_model_state_dict(model)
    train(accelerator, model, optimizer, loader, 3)
    accelerator.save_state(str(tmp_path / "state"))
    train(accelerator, model, optimizer, loader, 2)
    straight = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}

    accelerator = cpu()
    model, optimizer, loader = prepared(accelerator, CONFIGS[which]())
    accelerator.load_state(str(tmp_path / "state"))
    train(accelerator, model, optimizer, loader, 2)
    resumed = get_peft_model_state_dict(model)
    assert set(resumed) == set(straight) == set(start)
    assert all(torch.equal(resumed[k], v) for k, v in straight.items())


def test_a_prepared_model_is_saved_as_people_do(cpu, tmp_path):
    accelerator = cpu()
    model, optimizer, loader = prepared(accelerator, lora(modules_to_save=["lm_head"]))
    train(accelerator, model, optimizer, loader, 2)
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path / "a",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    out = logits(model.eval())
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "a").eval()), out)
    assert difference(out, logits(llama())) > 1e-3
    accelerator.save_model(model, str(tmp_path / "whole"))
    twin = get_peft_model(llama(), lora(modules_to_save=["lm_head"], seed=8)).eval()
    twin.load_state_dict(load_file(tmp_path / "whole" / "model.safetensors"), strict=False)
    assert torch.equal(logits(twin), out)


def test_values_given_for_the_file_are_the_ones_saved(tmp_path):
    """`state_dict` is not ignored: what was gathered elsewhere is written."""
    model = get_peft_model(llama(), lora())
    given = {k: torch.full_like(v, 0.5) if "adapters" in k else v for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=given)
    assert all((t == 0.5).all() for t in load_file(tmp_path / "adapter_model.safetensors").values())
    wrapped = {f"module.{k}": v for k, v in given.items()}
    assert all((t == 0.5).all() for t in get_peft_model_state_dict(model, state_dict=wrapped).values())


def test_accumulated_gradients_are_those_of_the_whole_batch(cpu):
    accelerator = cpu(gradient_accumulation_steps=2)
    model = get_peft_model(llama(), lora())
    model, loader = accelerator.prepare(model, DataLoader(list(IDS), batch_size=2))
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
    whole = get_peft_model(llama(), lora())
    whole(input_ids=IDS, labels=IDS).loss.backward()
    expected = {n: p.grad for n, p in whole.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad}
    assert set(found) == set(expected) and all(difference(found[n], g) < 1e-7 for n, g in expected.items())


# -- weights kept elsewhere -----------------------------------------------------------------------------------------------------------
LAYERS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
MAPS = {
    "half": {n: "cpu" if i < 3 else "disk" for i, n in enumerate(LAYERS)},
    "disk": dict.fromkeys(LAYERS, "disk"),
}
OFFLOADED = {
    "lora": lora,
    "embeddings": lambda: lora(target_modules=["embed_tokens", "lm_head"]),
    "dora": lambda: lora(use_dora=True),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "oft": lambda: OFTConfig(oft_block_size=4, target_modules=["q_proj", "down_proj"], init_weights=False, seed=7),
    "hra": lambda: HRAConfig(r=4, target_modules=["q_proj", "down_proj"], init_weights=False, seed=7),
    "boft": lambda: BOFTConfig(boft_block_size=4, target_modules=["q_proj"], seed=7),
    "loha": lambda: LoHaConfig(r=4, target_modules=["q_proj", "down_proj"], init_weights=False, seed=7),
    "vera": lambda: VeraConfig(r=4, target_modules=["q_proj"], init_weights=False, seed=7),
    "ia3": lambda: IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], seed=7),
    "biases": lambda: lora(target_modules=["q_proj"], bias="all"),
    "head": lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "block": lambda: lora(target_modules=["q_proj"], modules_to_save=["mlp"]),
    "tokens": lambda: lora(target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    "norms": lambda: LNTuningConfig(target_modules=["input_layernorm"], seed=7),
    "parameters": lambda: lora(target_modules=None, target_parameters=["q_proj.weight", "mlp.down_proj.weight"]),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, seed=7),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, seed=7),
}


def dispatched(where: str, folder: Path, model: nn.Module | None = None) -> nn.Module:
    folder = tempfile.mkdtemp(dir=folder)
    return accelerate.dispatch_model(
        model or llama(), device_map=MAPS[where], main_device="cpu", offload_dir=folder, force_hooks=True
    )


def jitter(model: nn.Module) -> None:
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=rng) * 0.1)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.eval()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def offloaded(model: nn.Module) -> int:
    return sum(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize("which", OFFLOADED)
def test_adapters_on_offloaded_weights(which, where, tmp_path):
    """Outputs, gradients, files, merging and unmerging are those of the model with all weights here."""
    plain, base = get_peft_model(llama(), OFFLOADED[which]()).eval(), dispatched(where, tmp_path)
    away = offloaded(base)
    model = get_peft_model(base, OFFLOADED[which]()).eval()
    jitter(plain), jitter(model)
    out = logits(plain)
    there = logits(model)
    assert difference(there, out) < ROUNDING and difference(out[:, -6:], logits(llama())) > 1e-5
    expected, found = gradients(plain), gradients(model)
    assert set(expected) == set(found) and all(difference(found[n], g) < 1e-6 for n, g in expected.items())
    assert not any(p.is_meta for p in model.parameters() if p.requires_grad)
    assert offloaded(model) == away, "the base's weights stay where they are kept"

    model.save_pretrained(tmp_path / "a")
    assert difference(logits(PeftModel.from_pretrained(llama(), tmp_path / "a").eval()), out) == 0
    again = PeftModel.from_pretrained(
        dispatched(where, tmp_path), tmp_path / "a", device_map=MAPS[where], offload_dir=str(tmp_path)
    )
    assert difference(logits(again.eval()), there) == 0
    if OFFLOADED[which]().is_prompt_learning:
        return
    hooks = [n for n, m in model.named_modules() if hasattr(m, "_hf_hook")]
    model.merge_adapter()
    assert difference(logits(model), out) < 2e-6
    model.unmerge_adapter()
    assert difference(logits(model), there) == 0
    with model.disable_adapter():
        assert difference(logits(model), logits(llama())) == 0
    assert [n for n, m in model.named_modules() if hasattr(m, "_hf_hook")] == hooks
    merged = model.merge_and_unload()
    assert difference(logits(merged), out) < 2e-6 and offloaded(merged) == away
    merged.save_pretrained(tmp_path / "merged")
    assert difference(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()), out) < 2e-6


def test_several_adapters_and_rows_on_offloaded_weights(tmp_path):
    plain, model = (get_peft_model(b, lora(use_dora=True)).eval() for b in (llama(), dispatched("disk", tmp_path)))
    for m in (plain, model):
        m.add_adapter("b", OFTConfig(oft_block_size=4, target_modules=["q_proj"], init_weights=False, seed=3))
    names = ["default", "b", "__base__", "b"]
    with torch.no_grad():
        out = plain(input_ids=IDS, adapter_names=names).logits
        assert difference(model(input_ids=IDS, adapter_names=names).logits, out) < ROUNDING
    for m in (plain, model):
        m.base_model.set_adapter(["default", "b"])
    assert difference(logits(model), logits(plain)) < ROUNDING
    model.delete_adapter("b")
    model.set_adapter("default")
    plain.set_adapter("default")
    assert difference(logits(model), logits(plain)) < ROUNDING


@pytest.mark.parametrize("which", ["lora", "dora", "head"])
def test_a_checkpoint_dispatched_by_its_loader(which, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    out = logits(plain := get_peft_model(llama(), OFFLOADED[which]()).eval())
    plain.save_pretrained(tmp_path / "a")
    with accelerate.init_empty_weights():
        empty = LlamaForCausalLM(llama().config)
    by_accelerate = accelerate.load_checkpoint_and_dispatch(
        empty, str(tmp_path / "base"), device_map=MAPS["half"], offload_folder=str(tmp_path / "x"), force_hooks=True
    )
    by_transformers = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=MAPS["half"], offload_folder=str(tmp_path / "y")
    )
    for base in (by_accelerate.eval(), by_transformers.eval()):
        assert offloaded(base) > 0
        model = PeftModel.from_pretrained(base, tmp_path / "a").eval()
        assert difference(logits(model), out) < ROUNDING
        assert difference(logits(model.merge_and_unload()), out) < 2e-6


def test_hooks_that_were_combined_are_seen(tmp_path):
    """Dispatching twice leaves sequences of hooks; a weight read through them is the weight."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    base = dispatched("disk", tmp_path)
    for m in base.modules():
        if isinstance(m, nn.Linear):
            add_hook_to_module(m, ModelHook(), append=True)
    model = get_peft_model(base, lora(use_dora=True)).eval()
    out = logits(get_peft_model(llama(), lora(use_dora=True)).eval())
    assert difference(logits(model), out) < ROUNDING
    model.merge_adapter()
    assert difference(logits(model), out) < 2e-6


def test_taking_the_hooks_off_keeps_a_merge(tmp_path):
    from accelerate.hooks import remove_hook_from_submodules

    model = get_peft_model(dispatched("disk", tmp_path), lora())
    out = logits(model)
    merged = model.merge_and_unload()
    layer = merged.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        read = layer._hf_hook.weights_map["weight"]
        expected = llama().model.layers[0].self_attn.q_proj.weight
    assert difference(read, expected) > 1e-3 and difference(logits(merged), out) < 2e-6
    remove_hook_from_submodules(merged)


@pytest.mark.parametrize("which", ["lora", "dora", "oft", "ia3"])
def test_empty_weights_and_adapters_without_memory(which, tmp_path):
    """The adapter is planned on empty weights and filled from its file; only then are there numbers."""
    model = get_peft_model(llama(), OFFLOADED[which]()).eval()
    jitter(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True).eval()
    assert difference(logits(again), logits(model)) == 0 and offloaded(again) == 0
    empty = get_peft_model(llama(), OFFLOADED[which](), low_cpu_mem_usage=True)
    assert all(p.is_meta for p in empty.adapter_parameters("default"))
    with pytest.raises(peft.CheckpointError, match="meta"):
        empty.save_pretrained(tmp_path / "no")
    with accelerate.init_empty_weights():
        shell = LlamaForCausalLM(llama().config)
    whole = get_peft_model(shell, OFFLOADED[which](), low_cpu_mem_usage=True)
    whole.load_state_dict(model.state_dict(), assign=True)
    shell.model.rotary_emb = llama().model.rotary_emb
    assert difference(logits(whole.eval()), logits(model)) == 0


# -- several processes ------------------------------------------------------------------------------------------------------------------
def run(tmp_path: Path, mode: str, processes: int = 2, timeout: int = 240) -> dict:
    """What `accelerate_worker.py` finds in `mode`, from its first process."""
    worker = Path(__file__).with_name("accelerate_worker.py")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    running = [
        subprocess.Popen(
            [sys.executable, str(worker), mode, str(rank), str(processes), str(tmp_path)],
            env={**env, "RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    texts = [p.communicate(timeout=timeout)[0] for p in running]
    assert all(p.returncode == 0 for p in running), "\n".join(t[-2500:] for t in texts)
    return torch.load(tmp_path / "found.pt", weights_only=False)


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_the_whole_batch(tmp_path):
    """DDP with all parameters used, gather and gather_for_metrics, and one file from the main process."""
    found = run(tmp_path, "ddp")
    for which, f in found.items():
        assert f["gradient"] < 1e-7 and f["moved"] > 1e-4, which
        assert f["gathered"] == 4 and f["metrics"] == 3, which
        assert f["reloaded"] == 0, which


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp2 blocks", "fsdp2 policy", "fsdp1"])
def test_sharded_models_train_as_one_process(mode, tmp_path):
    """Frozen and trained parameters side by side; sharded by blocks, or by the policy that names adapters' units."""
    found = run(tmp_path, mode)
    assert len(found) == 6
    for which, f in found.items():
        assert f["first"] < 1e-6 and f["second"] < 2e-6 and f["moved"] > 1e-4, (which, f)
        if mode != "fsdp1":  # torch's own state dict of FSDP 1 does not work on CPUs
            assert f["state"] < 1e-6 and f["reloaded"] < 2e-6, (which, f)
            assert f["adapter only"] == f["together"] == f["swapped"] == 0, (which, f)
            assert f.get("merged", 0) < 2e-6 and f.get("unloaded", 0) < 2e-6, (which, f)
            assert f.get("unmerged", 0) == 0 and f.get("written", 1) > 1e-3, (which, f)
