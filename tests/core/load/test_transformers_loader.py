"""transformers' own adapter methods, which load adapters through its loader."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import peft
from peft import CheckpointError, IA3Config, PeftModel, get_peft_model
from peft.core.acting.on_model import roster_of
from peft.core.load.transformers_loader import build_peft_weight_mapping, fill
from tests.helpers.tiny_llama import llama, logits, lora


def installed() -> bool:
    try:
        return bool(importlib.metadata.version("peft"))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_distribution = pytest.mark.skipif(
    not installed(), reason="transformers asks for the installed distribution's version: pip install -e ."
)

CONFIGS = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "with a head": lambda: lora(modules_to_save=["lm_head"]),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
}


@needs_distribution
@pytest.mark.parametrize("which", CONFIGS)
def test_transformers_adds_saves_and_loads_adapters(which, tmp_path):
    model = llama()
    base = logits(model)
    model.add_adapter(CONFIGS[which](), "v1.0")
    out = logits(model)
    assert not torch.equal(out, base) and model.active_adapters() == ["v1.0"]
    model.save_pretrained(tmp_path)
    assert all(k.startswith("base_model.model.") for k in load_file(tmp_path / "adapter_model.safetensors"))
    for name in ("default", "b.c"):
        other = llama()
        report = other.load_adapter(tmp_path, name)
        assert not report.missing_keys and not report.unexpected_keys and not report.mismatched_keys
        assert torch.equal(logits(other), out)
        assert not any(p.requires_grad for n, p in other.named_parameters() if ".adapters." in n)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), out)


@needs_distribution
def test_transformers_switches_disables_and_deletes(tmp_path):
    model = llama()
    base = logits(model)
    model.add_adapter(lora(), "a")
    a = logits(model)
    model.add_adapter(lora(r=2), "b")
    b = logits(model)
    model.set_adapter("a")
    assert torch.equal(logits(model), a) and not torch.equal(a, b)
    assert {n.split(".adapters.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"a"}
    model.set_adapter(["a", "b"])
    assert model.active_adapters() == ["a", "b"] and not torch.equal(logits(model), a)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    model.set_adapter("b")
    assert torch.equal(logits(model), b)
    state = model.get_adapter_state_dict("a")
    assert set(state) == {
        f"model.layers.{i}.self_attn.{p}_proj.lora_{x}.weight" for i in (0, 1) for p in "qv" for x in "AB"
    }
    model.delete_adapter("b")
    assert torch.equal(logits(model), a)
    model.delete_adapter("a")
    assert torch.equal(logits(model), base)
    model.add_adapter(lora(), "a")
    assert not torch.equal(logits(model), base)


@needs_distribution
def test_an_adapter_folder_is_a_model_for_transformers(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), lora(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(found), logits(model.eval()))


def test_a_files_tensors_fill_the_adapter_and_the_report_says_what_did_not_fit():
    model = get_peft_model(llama(), lora()).get_base_model()
    state = {k: torch.randn_like(v) for k, v in peft.get_peft_model_state_dict(model).items()}
    wrong, gone = sorted(state)[:2]
    first = {k: v for k, v in state.items() if k not in (wrong, gone)}
    given = {**first, wrong: torch.zeros(2, 3), "model.elsewhere.lora_A.weight": torch.zeros(1)}
    report = SimpleNamespace(missing_keys={"before"}, unexpected_keys=set(), mismatched_keys=set())
    fill(model, "default", None, given, report)
    now = peft.get_peft_model_state_dict(model)
    assert all(torch.equal(now[k], v) for k, v in first.items()) and not torch.equal(now[gone], state[gone])
    assert report.missing_keys == {f"{gone} (default)"}
    assert report.unexpected_keys == {"base_model.model.model.elsewhere.lora_A.weight"}
    ((key, theirs, ours),) = report.mismatched_keys
    assert key == f"{wrong} (default)" and theirs == (2, 3) and ours == tuple(state[wrong].shape)


def test_a_file_that_fills_nothing_is_an_error_and_the_adapter_is_taken_out():
    model = get_peft_model(llama(), lora()).get_base_model()
    report = SimpleNamespace(missing_keys=set(), unexpected_keys=set(), mismatched_keys=set())
    with pytest.raises(CheckpointError, match="does not fit"):
        fill(model, "default", None, {"model.elsewhere.lora_A.weight": torch.zeros(1)}, report)
    assert not getattr(roster_of(model), "adapters", None)


def test_one_transform_takes_every_key_and_is_no_part_of_saving():
    import copy

    (made,) = build_peft_weight_mapping(None, "default", lora())
    assert copy.deepcopy(made) is made and not made.was_used()
    assert made.rename_source_key("any.key")[0] == "any.key"
