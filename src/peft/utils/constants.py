"""Names of files and of special values."""

from __future__ import annotations

from collections.abc import Callable

from ..auto import TOKENIZER_CONFIG_NAME
from ..config import CONFIG_NAME
from ..core.anatomy.roles import ROLES
from ..core.anatomy.targets import ALL_LINEAR as INCLUDE_LINEAR_LAYERS_SHORTHAND
from ..core.files.adapter_files import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from ..registry import methods
from ..upstream.functions import bloom_model_postprocess_past_key_value, starcoder_model_postprocess_past_key_value

__all__ = [
    "CONFIG_NAME",
    "DUMMY_MODEL_CONFIG",
    "DUMMY_TARGET_MODULES",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "SEQ_CLS_HEAD_NAMES",
    "TOKENIZER_CONFIG_NAME",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "WEIGHTS_NAME",
    "bloom_model_postprocess_past_key_value",
    "starcoder_model_postprocess_past_key_value",
]

DUMMY_TARGET_MODULES = "dummy-target-modules"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Callable[..., object]] = {}


def __getattr__(name: str) -> dict[str, list[str]]:
    """`TRANSFORMERS_MODELS_TO_<METHOD>_TARGET_MODULES_MAPPING`: model type -> default targets, from `core/anatomy/roles.py`."""
    if name == "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING":
        return {t: list(targets) for targets, types in reversed(ROLES["ffn"]) for t in types}
    asked = name.removeprefix("TRANSFORMERS_MODELS_TO_").removesuffix("_TARGET_MODULES_MAPPING")
    for known, cls in methods().items():
        if asked == known.replace("_", "") and len(asked) < len(name):
            return {t: list(targets) for targets, types in reversed(ROLES[cls.role]) for t in types}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
