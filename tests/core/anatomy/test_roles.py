"""Default targets by model type: each role's modules are there, and an unknown type is told what is known."""

from __future__ import annotations

import pytest
import torch

from peft import LoraConfig, NoMatchingPeftModuleError
from peft.core.anatomy.roles import ROLES, default_targets
from peft.core.anatomy.targets import find

NO_SUCH_TYPE = ("RefinedWeb", "RefinedWebModel", "btlm", "chatglm", "rwkv7")  # models whose code comes with their files


@pytest.mark.parametrize(
    ("role", "model_type", "expected"),
    [
        ("attention", "llama", ["q_proj", "v_proj"]),
        ("attention", "gpt2", ["c_attn"]),
        ("attention", "phi", ["q_proj", "v_proj", "fc1", "fc2"]),
        ("keys_values_ffn", "llama", ["k_proj", "v_proj", "down_proj"]),
        ("ffn", "mt5", []),
        ("norms", "gpt2", ["ln_1", "ln_2", "ln_f"]),
        ("every_linear", "t5", ["q", "k", "v", "o", "wi", "wo"]),
    ],
)
def test_a_role_has_its_modules(role, model_type, expected):
    assert default_targets(role, model_type, "METHOD") == expected


def test_where_every_linear_is_not_listed_the_attention_is_taken():
    assert default_targets("every_linear", "llama", "METHOD") == ["q_proj", "v_proj"]


def test_a_pattern_is_given_as_one_regex():
    assert default_targets("blocks", "gpt2", "METHOD") == r"(.*\.)?h\.\d+"


def test_an_unknown_type_is_an_error_with_the_near_ones():
    with pytest.raises(NoMatchingPeftModuleError, match=r"METHOD has no default for model type 'lama'.*llama"):
        default_targets("attention", "lama", "METHOD")


def types() -> list[str]:
    return sorted({t for table in ROLES.values() for _, types in table for t in types})


@pytest.mark.parametrize("model_type", types())
def test_the_defaults_of_a_type_are_modules_of_todays_models(model_type):
    transformers = pytest.importorskip("transformers")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if model_type not in known:
        assert model_type in NO_SUCH_TYPE or not hasattr(transformers, "Gemma4Config"), f"{model_type} has gone"
        pytest.skip(f"this transformers has no {model_type}")
    config = known[model_type]()
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, 2)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    for role, table in ROLES.items():
        if any(model_type in types and names for names, types in table):
            find(model, LoraConfig(target_modules=default_targets(role, model_type, "METHOD")))


@pytest.mark.parametrize("model_type", ["vit", "dinov2", "segformer", "whisper", "clip"])
def test_attention_has_defaults_for_pictures_and_speech(model_type):
    assert default_targets("attention", model_type, "METHOD")
