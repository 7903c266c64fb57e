"""Upstream's import paths and class names: what libraries import and ask with isinstance."""

from __future__ import annotations

import importlib
import importlib.metadata

import pytest
import torch

import peft
from peft import get_peft_model, registry
from peft.upstream.classes import BaseTunerLayer, door, layer_view
from tests.helpers.tiny_llama import llama, logits, lora

IMPORTED = """
peft.functional:delete_adapter peft.helpers:disable_input_dtype_casting peft.tuners.loha.layer:LoHaLayer
peft.tuners.lokr.layer:LoKrLayer peft.tuners.lokr.layer:factorization peft.tuners.lora.layer:LoraLayer
peft.tuners.lora:LoraLayer peft.tuners.tuners_utils:BaseTunerLayer peft.utils.hotswap:check_hotswap_configs_compatible
peft.utils.hotswap:hotswap_adapter_from_state_dict peft.utils.hotswap:prepare_model_for_compiled_hotswap
peft.utils.other:AuxiliaryTrainingWrapper peft.utils.other:fsdp_auto_wrap_policy peft.utils:ModulesToSaveWrapper
peft.utils.transformers_weight_conversion:build_peft_weight_mapping peft.utils:_get_submodules
peft.utils:get_peft_model_state_dict peft:LoKrConfig peft:LoraConfig peft:PeftConfig peft:PeftMixedModel peft:PeftModel
peft:PeftType peft:PrefixTuningConfig peft:PromptLearningConfig peft:get_peft_model peft:get_peft_model_state_dict
peft:inject_adapter_in_model peft:prepare_model_for_kbit_training peft:set_peft_model_state_dict
peft:AutoPeftModelForCausalLM
""".split()


@pytest.mark.parametrize("symbol", IMPORTED)
def test_what_other_libraries_import_is_there(symbol):
    module, name = symbol.split(":")
    assert getattr(importlib.import_module(module), name)


def test_every_method_has_upstreams_package_without_an_edit():
    for name, method in registry.methods().items():
        file = method.__module__.rsplit(".", 1)[-1]
        config = method.config_class.__name__
        for module in (f"peft.tuners.{file}", f"peft.tuners.{file}.config", "peft.tuners", "peft"):
            assert getattr(importlib.import_module(module), config) is method.config_class
        layer = getattr(importlib.import_module(f"peft.tuners.{file}.layer"), config.replace("Config", "Layer"))
        assert isinstance(layer, type)
        assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[name] is peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]
        assert peft.PEFT_TYPE_TO_PREFIX_MAPPING[name] == method.prefix


def test_layer_classes_are_views_of_what_a_layer_holds():
    from peft.tuners.loha import LoHaLayer
    from peft.tuners.lora import Embedding, Linear, LoraLayer

    from peft import LoHaConfig, LoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    model = get_peft_model(llama(), lora(modules_to_save=["lm_head"], target_modules=["q_proj", "embed_tokens"]))
    model.add_adapter("h", LoHaConfig(target_modules=["v_proj"]))
    base = model.get_base_model()
    attention = base.model.layers[0].self_attn
    q, v, head, embed = attention.q_proj, attention.v_proj, base.lm_head, base.model.embed_tokens
    assert isinstance(q, LoraLayer) and isinstance(q, Linear) and not isinstance(q, (LoHaLayer, Embedding))
    assert isinstance(v, LoHaLayer) and not isinstance(v, LoraLayer)
    assert isinstance(embed, Embedding) and not isinstance(embed, Linear)
    assert isinstance(head, ModulesToSaveWrapper) and not isinstance(q, ModulesToSaveWrapper)
    assert all(isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for m in (q, v, head, embed))
    assert not isinstance(attention, BaseTunerLayer) and not isinstance(attention, LoraLayer)
    assert isinstance(model.base_model, LoraModel) and not isinstance(base, LoraModel)


def test_tuner_classes_make_tuners():
    from peft import LoraModel
    from peft.tuners.tuners_utils import BaseTuner

    tuner = LoraModel(llama(), lora(), "default")
    assert isinstance(tuner, LoraModel) and isinstance(tuner, BaseTuner)
    assert not torch.equal(logits(tuner), logits(llama())) and tuner.prefix == "lora_"


def test_a_view_makes_no_layer_and_reaches_none():
    View = layer_view("AnyLayer", "lora_")
    q = get_peft_model(llama(), lora()).get_base_model().model.layers[0].self_attn.q_proj
    assert isinstance(q, View) and isinstance(q, BaseTunerLayer)
    assert not isinstance(q, layer_view("OtherLayer", "oft_"))
    assert not isinstance(q, layer_view("OfEmbeddings", "lora_", base=torch.nn.Embedding))
    with pytest.raises(TypeError, match="AnyLayer is a view for isinstance"):
        View(torch.nn.Linear(2, 2), "default")
    with pytest.raises(AttributeError, match="patching forward on it would reach no layer"):
        View.forward = None
    assert View.merge is type(q).merge


def test_a_door_is_made_of_a_methods_file_alone():
    import peft.methods.hra
    import peft.registry

    made = door("peft.tuners.somewhere", peft.methods.hra)
    assert made.HRAConfig is made.config.HRAConfig is peft.methods.hra.HRAConfig
    assert made.HRALayer.prefix == made.HRAModel.prefix == peft.registry.method("HRA").prefix
    assert door("peft.tuners.nowhere", peft.registry) is None
