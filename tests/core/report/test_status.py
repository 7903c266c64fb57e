"""What layer and model status tell."""

from __future__ import annotations

import pytest

import peft
from peft import get_peft_model
from peft.core.adapted.layer import adapted_layers
from peft.core.report.status import get_layer_status, get_model_status
from tests.helpers.tiny_llama import llama, lora


def test_status_of_layers_and_of_the_model():
    model = get_peft_model(llama(), lora())
    model.add_adapter("b", lora(target_modules=["q_proj"]))
    layers = model.get_layer_status()
    assert [x.name for x in layers][:2] == [f"model.model.layers.0.self_attn.{n}_proj" for n in "qv"]
    assert layers[0].module_type == "lora.Linear" and layers[0].available_adapters == ["b", "default"]
    assert layers[0].requires_grad == {"default": True, "b": False} and layers[1].available_adapters == ["default"]
    status = model.get_model_status()
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    assert status.peft_types == {"default": "LORA", "b": "LORA"} and status.num_adapter_layers == 4
    assert status.enabled is True and status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.requires_grad == {"b": False, "default": True} and status.devices == {
        "b": ["cpu"],
        "default": ["cpu"],
    }
    model.base_model.disable_adapter_layers()
    assert model.get_model_status().enabled is False
    model.base_model.enable_adapter_layers()
    list(adapted_layers(model))[0].merge()
    assert model.get_model_status().merged_adapters == "irregular"
    next(model.adapter_parameters("default")).requires_grad_(False)
    assert model.get_layer_status()[0].requires_grad["default"] == "irregular"
    assert model.get_model_status().requires_grad["default"] == "irregular"
    assert peft.get_model_status(peft.inject_adapter_in_model(lora(), llama())).base_model_type == "LlamaForCausalLM"
    with pytest.raises(ValueError, match="adapter"):
        peft.get_model_status(llama())


def test_where_layers_differ_the_status_says_so():
    model = get_peft_model(llama(), lora())
    first = next(s for s in get_layer_status(model))
    assert first.module_type == "lora.Linear" and first.requires_grad == {"default": True}
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.methods["default"][0].lora_A_weight.requires_grad_(False)
    assert get_layer_status(model)[0].requires_grad == {"default": "irregular"}
    assert get_model_status(model).requires_grad == {"default": "irregular"}
    layer.merge()
    assert get_model_status(model).merged_adapters == "irregular"
    assert get_model_status(model.get_base_model()).adapter_model_type == "None"
