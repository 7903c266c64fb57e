"""Names and paths that code written for upstream imports."""

from __future__ import annotations

import importlib

import pytest

import peft.tuners
from peft import import_utils

# each of these resolves with upstream 0.21.2
PATHS = """
peft.utils.other:prepare_model_for_kbit_training peft.import_utils:is_transformers_ge_v5
peft.import_utils:is_transformers_ge_v5_1_0 peft.import_utils:is_transformers_ge_v5_4_0
peft.import_utils:is_transformers_le_4_53 peft.tuners.lora.model:TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
peft.tuners.ia3.model:TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING peft.tuners.loha.layer:Linear
peft.tuners.lokr.layer:Conv2d peft.tuners.hra.layer:HRALinear peft.tuners.adalora.layer:SVDLinear
peft.tuners.vera.model:TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING peft.tuners.lora.layer:BaseTunerLayer
peft.peft_model:set_peft_model_state_dict peft.peft_model:PeftType peft.peft_model:WEIGHTS_NAME
peft.tuners.lora.layer:check_adapters_to_merge peft.tuners.oft.layer:Linear peft.tuners.boft.layer:Linear
""".split()


@pytest.mark.parametrize("path", PATHS)
def test_it_is_there(path):
    module, name = path.split(":")
    assert getattr(importlib.import_module(module), name) is not None


def test_versions_are_values():
    assert import_utils.is_transformers_ge_v5 is True and import_utils.is_transformers_le_4_53 is False


def test_names_that_nobody_has_are_missing():
    with pytest.raises(AttributeError, match="NOTHING"):
        peft.tuners.lora.layer.NOTHING  # noqa: B018
