"""The words of upstream 0.21.2's errors on which code matches are in ours, in errors that the same `except` catches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import (
    LoraConfig,
    PeftModel,
    Refusal,
    get_layer_status,
    get_peft_model,
    inject_adapter_in_model,
)
from tests.helpers.selective import llama


def lora(**more) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **more})


def two(first=None, second=None):
    model = get_peft_model(llama(), first or lora(), "a").eval()
    model.add_adapter("b", second or lora())
    return model


def combine(model, names="ab", kind="cat"):
    model.add_weighted_adapter(list(names), [1.0] * len(names), "c", combination_type=kind)


def broken(model):
    for p in model.adapter_parameters("a"):
        nn.init.constant_(p, torch.nan)
    model.merge_and_unload(safe_merge=True)


HEAD = {"modules_to_save": ["lm_head"]}
BARE = {"target_modules": [], "target_parameters": ["q_proj.weight"]}
CASES = {  # upstream's words as a pattern, its class, the call
    "no target": (r"Target modules .* not found in the base model", ValueError, lambda: get_peft_model(llama(), lora(target_modules=["zz"]))),
    "no target, injected": (r"Target modules .* not found in the base model", ValueError, lambda: inject_adapter_in_model(lora(target_modules="zz"), llama())),
    "all excluded": (r"No modules were targeted for adaptation", ValueError, lambda: get_peft_model(llama(), lora(exclude_modules=["q_proj"]))),
    "nothing to target": (r"Please specify `target_modules`", ValueError, lambda: get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig())),
    "activate": (r"Adapter zz not found", ValueError, lambda: two().set_adapter("zz")),
    "delete": (r"Adapter zz does not exist", ValueError, lambda: two().delete_adapter("zz")),
    "taken name": (r"Adapter with name '?a'? already exists", ValueError, lambda: two().add_adapter("a", lora())),
    "combine, unknown": (r"Adapter z does not exist", ValueError, lambda: combine(two(), "az")),
    "combine, ranks": (r"All adapters must have the same r value", ValueError, lambda: combine(two(lora(), lora(r=4)), kind="linear")),
    "combine, type": (r"Invalid combination_type", ValueError, lambda: combine(two(), kind="foo")),
    "combine, heads": (r"Cannot add weighted adapters.*modules_to_save|modules_to_save.*Cannot add weighted adapters", ValueError, lambda: combine(two(lora(**HEAD), lora(**HEAD)))),
    "combine, parameters": (r"add_weighted_adapter does not support targeting nn.Parameter", ValueError, lambda: combine(two(lora(**BARE), lora()))),
    "two heads": (r"Only one adapter can be set at a time", ValueError, lambda: two(lora(**HEAD), lora(**HEAD)).base_model.set_adapter(["a", "b"])),
    "task type": (r"Invalid task type: 'FOO'", ValueError, lambda: lora(task_type="FOO")),
    "rank": (r"`r` should be .* but the value passed is 0", ValueError, lambda: get_peft_model(llama(), lora(r=0))),
    "start": (r"Unknown initialization init_lora_weights='foo'", ValueError, lambda: get_peft_model(llama(), lora(init_lora_weights="foo"))),
    "layers": (r"`layers_to_transform` cannot be used when `target_modules` is a str", ValueError, lambda: lora(target_modules="q", layers_to_transform=[0])),
    "rows' adapters": (r"Length of `adapter_names` should be the same as the number of inputs", ValueError, lambda: two()(torch.tensor([[1]]), adapter_names=["a", "b"])),
    "NaN": (r"NaNs detected in", ValueError, lambda: broken(two())),
    "no adapters": (r"No adapter layers found in the model", ValueError, lambda: get_layer_status(llama())),
    "no config": (r"Can't find 'adapter_config.json' at", ValueError, lambda: LoraConfig.from_pretrained("/nowhere")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_errors_hold_upstreams_words(case):
    words, error, call = CASES[case]
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: {k: v for k, v in t.items() if "lora_B" not in k}, "missing adapter keys"),
        (lambda t: {**t, "base_model.model.foo.lora_A.weight": torch.ones(2, 2)}, "unexpected keys"),
        (lambda t: {k: torch.zeros(7, 3) for k in t}, "size mismatch"),
    ],
)
def test_errors_of_files_hold_them_too(change, words, tmp_path):
    from safetensors.torch import load_file, save_file

    get_peft_model(llama(), lora()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=words):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_layer_of_dora_is_called_as_upstreams():
    status = get_layer_status(get_peft_model(llama(), lora(use_dora=True)))
    assert {s.module_type for s in status} == {"lora.Linear"}


def test_custom_lora_layers_say_what_to_do_instead():
    with pytest.raises(Refusal, match="LayerKind"):
        lora()._register_custom_module({nn.Linear: nn.Linear})
