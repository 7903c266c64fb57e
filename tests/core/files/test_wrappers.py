"""torch's wrappers (compiled, checkpointed, DDP, FSDP) enter neither the files nor what these say of the base."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed._composable import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from peft import CheckpointError, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.contract.tree import without_wrappers
from peft.core.files.header import Loaded, check_base, fingerprint, same_class
from peft.core.files.sharded import bare
from tests.helpers.tiny_llama import llama


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    where = tmp_path_factory.mktemp("group") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{where}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def layers(model: nn.Module, wrap) -> nn.Module:
    stack = (model.get_base_model() if isinstance(model, PeftModel) else model).model.layers
    for i, layer in enumerate(stack):
        stack[i] = wrap(layer)
    return model


def sharded(model: nn.Module) -> nn.Module:
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    return fully_shard(layers(model, lambda m: fully_shard(m, mesh=mesh)), mesh=mesh)


WRAPPERS = {
    "none": lambda m: m,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "regional": lambda m: layers(m, lambda x: torch.compile(x, backend="eager")),
    "checkpointed": lambda m: layers(m, checkpoint_wrapper),
    "both": lambda m: layers(m, lambda x: torch.compile(checkpoint_wrapper(x), backend="eager")),
    "fsdp2": sharded,
    "fsdp1": lambda m: FullyShardedDataParallel(m, use_orig_params=True, device_id=torch.device("cpu")),
    "ddp": DistributedDataParallel,
    "dp": nn.DataParallel,
    "replicate": replicate,
}


def config() -> LoraConfig:
    return LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        layers_to_transform=[1],
        rank_pattern={"layers.1.self_attn.v_proj": 2},
        modules_to_save=["lm_head"],
        seed=1,
    )


def files(folder) -> list[bytes]:
    return [(folder / n).read_bytes() for n in ("adapter_model.safetensors", "adapter_config.json")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    get_peft_model(llama(), config()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("first", ["wrapper", "adapters"])
@pytest.mark.parametrize("which", WRAPPERS)
def test_files_are_those_of_the_plain_model(which, first, plain, tmp_path):
    """And what was trained on any of them loads on any other, since the plain file loads on all."""
    if first == "wrapper":
        model = get_peft_model(WRAPPERS[which](llama()), config())
    else:
        model = bare(WRAPPERS[which](get_peft_model(llama(), config())))
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == files(plain)


@pytest.mark.parametrize("which", WRAPPERS)
def test_the_plain_file_loads_on_all(which, plain):
    base = llama().requires_grad_(True)
    model = PeftModel.from_pretrained(WRAPPERS[which](base), plain)
    found, expected = get_peft_model_state_dict(model), load_file(plain / "adapter_model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())


@pytest.mark.parametrize("step", ["_orig_mod.", "module.", "_fsdp_wrapped_module."])
def test_files_with_the_steps_of_wrappers_in_their_keys_load(step, plain, tmp_path):
    """Written by upstream from a base that was compiled, or by hand from a whole state dict."""
    tensors = load_file(plain / "adapter_model.safetensors")
    root = "base_model.model."
    ways = {
        "inside": lambda k: root + step + k.removeprefix(root),
        "outside": lambda k: step + k,
        "layer": lambda k: k.replace("layers.1.", f"layers.1.{step}") if step != "module." else k,
    }
    for way, rename in ways.items():
        (folder := tmp_path / way).mkdir()
        save_file({rename(k): v for k, v in tensors.items()}, folder / "adapter_model.safetensors")
        stated = json.loads(files(plain)[1])
        stated["target_modules"] = (
            [f"model.layers.1.{step}self_attn.{p}_proj" for p in "qv"] if way == "layer" else ["q_proj", "v_proj"]
        )
        if step == "module.":
            stated["target_modules"] = ["q_proj", "v_proj"]
        (folder / "adapter_config.json").write_text(json.dumps(stated))
        found = get_peft_model_state_dict(PeftModel.from_pretrained(llama(), folder))
        assert found.keys() == tensors.keys() and all(torch.equal(found[k], v) for k, v in tensors.items()), way


def test_a_part_called_module_is_no_wrapper():
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.rest = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)

    model = get_peft_model(Owner(), LoraConfig(r=2, target_modules=["module.0"]))
    assert list(get_peft_model_state_dict(model))[0] == "base_model.model.module.0.lora_A.weight"
    assert without_wrappers("module._orig_mod.0._checkpoint_wrapped_module") == "module.0"


def test_classes_are_compared_without_what_was_put_around_them():
    model = llama()
    made = {"__module__": "torch.distributed.fsdp._fully_shard._fully_shard"}
    model.__class__ = type("FSDPLlamaForCausalLM", (type(llama()),), made)
    assert same_class("LlamaForCausalLM", model)
    model.__class__ = type("Mine", (type(llama()),), {})
    assert not same_class("LlamaForCausalLM", model)
    assert all(same_class(n, llama()) for n in ("FSDPLlamaForCausalLM", "OptimizedModule", "LLaMAForCausalLM"))
    assert not same_class("LlamaModel", llama()) and not same_class("OtherForCausalLM", llama())
    base = get_peft_model(llama(), config()).get_base_model()
    adapter = base._peft_roster.adapters["default"]
    check_base(base, Loaded(config(), {}, {**fingerprint(base, adapter), "class": "DDPLlamaForCausalLM"}), adapter)
    with pytest.raises(CheckpointError, match="trained on a LlamaModel"):
        check_base(base, Loaded(config(), {}, {**fingerprint(base, adapter), "class": "LlamaModel"}), adapter)
