"""AutoPeftModel classes: base and adapter from one folder."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import peft
from peft import get_peft_model
from peft.auto import check_import_allowlist, get_default_import_allowlist
from tests.helpers.tiny_llama import llama, logits, lora


@pytest.fixture
def folders(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora(task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, model


@pytest.mark.parametrize("name", ["AutoPeftModel", "AutoPeftModelForCausalLM"])
def test_auto_classes_load_base_and_adapter(name, folders):
    folder, model = folders
    found = getattr(peft, name).from_pretrained(folder / "adapter", adapter_name="x", is_trainable=True)
    assert type(found) is peft.PeftModelForCausalLM and found.active_adapters == ["x"]
    assert torch.equal(logits(found.eval()), logits(model))
    assert all(p.requires_grad for p in found.adapter_parameters("x"))
    half = getattr(peft, name).from_pretrained(folder / "adapter", dtype=torch.bfloat16)
    assert half.get_base_model().dtype == torch.bfloat16


def test_auto_classes_refuse_what_they_are_not_for(folders):
    folder, _ = folders
    with pytest.raises(ValueError, match="SEQ_CLS.*CAUSAL_LM"):
        peft.AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter")
    with pytest.raises(OSError, match="from_pretrained"):
        peft.AutoPeftModelForCausalLM()


def test_auto_classes_resize_to_the_tokenizer_beside_the_adapter(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70)
    model = get_peft_model(base, lora(task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    vocabulary = {f"t{i}": i for i in range(70)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "t0")))
    tokenizer.save_pretrained(tmp_path / "adapter")
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert found.get_base_model().get_input_embeddings().num_embeddings == 70
    assert torch.equal(logits(found), logits(model))


def test_auto_model_without_a_task_takes_the_class_from_an_allowed_package(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, lora()).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(peft.AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()), logits(model))
    with pytest.raises(ValueError, match="import_allowlist"):
        peft.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["diffusers"])


def test_a_package_is_allowed_with_what_lies_inside_it():
    allowed = get_default_import_allowlist()
    assert check_import_allowlist(allowed, "transformers") and check_import_allowlist(
        allowed, "transformers.models.bert"
    )
    assert not check_import_allowlist(allowed, "transformers_evil") and not check_import_allowlist([], "transformers")
    allowed.append("mine")
    assert "mine" not in get_default_import_allowlist()
