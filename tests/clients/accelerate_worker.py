"""One of several processes of tests/clients/test_accelerate.py: mode, rank, number of processes, folder."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from peft import (
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.upstream.functions import get_base_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from peft.utils.other import fsdp_auto_wrap_policy

MODE, RANK, WORLD, FOLDER = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
IDS = torch.arange(24).reshape(4, 6)
MINE = IDS.chunk(WORLD)[RANK]
BASE = {"r": 3, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "seed": 1}
CONFIGS = {
    "lora": lambda: LoraConfig(**BASE),
    "dora": lambda: LoraConfig(**BASE, use_dora=True),
    "head": lambda: LoraConfig(**BASE, modules_to_save=["lm_head"]),
    "ia3": lambda: IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], seed=1),
    "oft": lambda: OFTConfig(target_modules=["q_proj", "v_proj"], oft_block_size=4, init_weights=False, seed=1),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, seed=1),
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, num_hidden_layers=2, initializer_range=0.2))


def trained(model) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def largest(a, b) -> float:
    assert set(a) == set(b)
    return max(float((a[k] - b[k]).abs().max()) for k in b)


def step(model, ids) -> list[torch.Tensor]:
    """The loss before and after one step, as means over the processes."""
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    losses = []
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.detach().clone())
        optimizer.zero_grad()
        loss.backward()
        if len(losses) == 1:
            optimizer.step()
    if ids is not IDS:
        for loss in losses:
            dist.all_reduce(loss)
            loss /= WORLD
    return losses


def shard(model):
    if MODE == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        policy = fsdp_auto_wrap_policy(model)
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    units = list(model.get_base_model().model.layers)
    if MODE == "fsdp2 policy":
        policy = fsdp_auto_wrap_policy(model)
        units = [m for m in reversed(list(model.modules())) if policy(module=m, recurse=False, nonwrapped_numel=10**9)]
    for unit in units:
        fully_shard(unit, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full(state) -> dict[str, torch.Tensor]:
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}


@torch.no_grad()
def step_on_all(model) -> float:
    """The loss of the whole batch, each process having its rows."""
    loss = model(input_ids=MINE, labels=MINE).loss
    dist.all_reduce(loss)
    return float(loss / WORLD)


def swapped(model) -> float:
    """How far an adapter is from its file that was swapped in after its values had been lost."""
    own = {k: v.clone() for k, v in full(get_peft_model_state_dict(model)).items()}
    set_peft_model_state_dict(model, {k: torch.zeros_like(v) for k, v in own.items()})
    step_on_all(model)
    if model.active_peft_config.is_prompt_learning:
        model.load_adapter(FOLDER / "together", "default")
    else:
        hotswap_adapter(model, FOLDER / "together", "default")
    return largest(full(get_peft_model_state_dict(model)), own)


def merged(model, whole) -> dict[str, float]:
    """Losses of the merged model, of the one unmerged again, and of what is left when the adapter is taken out."""
    if model.active_peft_config.is_prompt_learning:
        return {}
    with torch.no_grad():
        expected = float(whole(input_ids=IDS, labels=IDS).loss)
    model.eval()
    before = {k: v.clone() for k, v in full(get_base_model_state_dict(model)).items()}
    out = {}
    model.merge_adapter()
    out["merged"] = abs(step_on_all(model) - expected)
    out["written"] = largest(full(get_base_model_state_dict(model)), before)
    model.unmerge_adapter()
    out["unmerged"] = largest(full(get_base_model_state_dict(model)), before)
    step_on_all(model)
    base = model.merge_and_unload()
    out["unloaded"] = max(abs(step_on_all(base) - expected) for _ in range(2))
    return out


def sharded(config) -> dict:
    whole = get_peft_model(llama(), config())
    expected = step(whole, IDS)
    model = shard(get_peft_model(llama(), config()))
    found = step(model, MINE)
    out = {"first": float((found[0] - expected[0]).abs()), "second": float((found[1] - expected[1]).abs())}
    out["moved"] = float((expected[1] - expected[0]).abs())
    if MODE == "fsdp1":
        return out
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    own = get_peft_model_state_dict(model)  # pieces, for a distributed checkpoint
    kept = {k: v.clone() for k, v in own.items()}
    set_peft_model_state_dict(model, {k: torch.zeros_like(v) for k, v in own.items()})
    set_peft_model_state_dict(model, kept)
    back = get_peft_model_state_dict(model)
    out["adapter only"] = max(float((back[k].full_tensor() - kept[k].full_tensor()).abs().max()) for k in kept)
    with torch.no_grad():
        step_on_all(model)  # leaves whole tensors of the outermost unit behind
    model.save_pretrained(FOLDER / "together", is_main_process=RANK == WORLD - 1)
    out["together"] = largest(load_file(FOLDER / "together" / "adapter_model.safetensors"), full(back))
    out["swapped"] = swapped(model)
    if RANK == 0:
        out["state"] = largest(get_peft_model_state_dict(model, state_dict=gathered), get_peft_model_state_dict(whole))
        model.save_pretrained(FOLDER / "saved", state_dict=gathered)
        again = PeftModel.from_pretrained(llama(), FOLDER / "saved")
        with torch.no_grad():
            out["reloaded"] = float((again(input_ids=IDS, labels=IDS).loss - expected[1]).abs())
    return out | merged(model, whole)


def ddp(config) -> dict:
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    whole = get_peft_model(llama(), config())
    whole(input_ids=IDS, labels=IDS).loss.backward()
    model, loader = accelerator.prepare(get_peft_model(llama(), config()), DataLoader(list(IDS), batch_size=2))
    assert type(model).__name__ == "DistributedDataParallel" and not model.find_unused_parameters
    (batch,) = list(loader)
    accelerator.backward(model(input_ids=batch, labels=batch).loss)
    inner = accelerator.unwrap_model(model)
    grads = {n: p.grad for n, p in inner.named_parameters() if p.requires_grad}
    out = {"gradient": largest(grads, {n: p.grad for n, p in whole.named_parameters() if p.requires_grad})}
    optimizer = accelerator.prepare(torch.optim.SGD(trained(inner), lr=1.0))
    with torch.no_grad():
        before = inner(input_ids=IDS, labels=IDS).loss
        optimizer.step()
        after = inner(input_ids=IDS, labels=IDS).loss
    out["moved"] = float((after - before).abs())
    out["gathered"] = len(accelerator.gather(batch))
    uneven = accelerator.prepare(DataLoader(list(IDS[:3]), batch_size=1))
    out["metrics"] = sum(len(accelerator.gather_for_metrics(b)) for b in uneven)
    inner.save_pretrained(
        FOLDER / "saved", is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(model)
    )
    accelerator.wait_for_everyone()
    with torch.no_grad():
        again = PeftModel.from_pretrained(llama(), FOLDER / "saved")
        out["reloaded"] = float((again(input_ids=IDS, labels=IDS).loss - after).abs())
    accelerator.wait_for_everyone()
    return out


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # accelerate asks for them; the group meets in a file
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/rendezvous", rank=RANK, world_size=WORLD)
    results = {name: (ddp if MODE == "ddp" else sharded)(config) for name, config in CONFIGS.items()}
    if RANK == 0:
        torch.save(results, FOLDER / "found.pt")
    dist.barrier()
    dist.destroy_process_group()
