"""Adapters under a default device of the caller's: they are drawn as ever, and lie where the base's weights lie."""

from __future__ import annotations

import warnings

import pytest
import torch

from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model, registry
from peft.contract.cheap_modules import made_on_the_cpu
from tests.helpers.tiny_llama import llama

METHODS = registry.methods()
NAMES_NOTHING = {"BITFIT", "TRAINABLE_TOKENS"}  # which find their own targets


def config(name):
    cls = METHODS[name]
    fields = {**cls.examples[0], "task_type": "CAUSAL_LM", "seed": 3}
    if cls.form != "prompt" and name not in NAMES_NOTHING:
        fields.setdefault("target_modules", ["q_proj", "v_proj"])
    return cls.config_class(**fields)


def base(device="cpu"):
    with torch.device(device):
        made = llama()
        for m in made.modules():  # something to train for the methods of biases
            if type(m) is torch.nn.Linear:
                m.bias = torch.nn.Parameter(torch.zeros(m.out_features))
    return made


@pytest.mark.parametrize("name", METHODS)
def test_under_a_meta_default_an_adapter_is_the_same_and_lies_where_its_base_lies(name):
    warnings.simplefilter("ignore")
    ids = torch.arange(6)[None]
    with torch.device("meta"):
        real, empty = get_peft_model(base("cpu"), config(name)), get_peft_model(base("meta"), config(name))
    plain = get_peft_model(base(), config(name))
    assert all(p.is_meta for p in empty.parameters() if p.requires_grad) and not any(
        p.is_meta for p in real.parameters()
    )
    found, wanted = (dict(m.named_parameters()) for m in (real, plain))
    assert found.keys() == wanted.keys()
    for key in (k for k, p in wanted.items() if p.requires_grad):
        assert torch.equal(found[key], wanted[key]), key
    assert torch.isfinite(real(ids).logits).all()


def test_so_do_adapters_that_are_injected_or_loaded(tmp_path):
    get_peft_model(base(), config("LORA")).save_pretrained(tmp_path)
    with torch.device("meta"):
        injected = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), base("cpu"))
        loaded = PeftModel.from_pretrained(base("cpu"), tmp_path)
        loaded.load_adapter(tmp_path, "second")
        loaded.load_adapter(tmp_path, "second")
    for model in (injected, loaded):
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_the_callers_default_is_as_it_was():
    with torch.device("meta"):
        with made_on_the_cpu():
            assert torch.empty(1).device.type == "cpu"
        assert torch.empty(1).is_meta
        with pytest.raises(ValueError, match="mine"), made_on_the_cpu():
            raise ValueError("mine")
        assert torch.empty(1).is_meta
