"""Parameter-efficient fine-tuning: any method on any layer of any PyTorch model.

from transformers import AutoModelForCausalLM
from peft import LoraConfig, get_peft_model

model = get_peft_model(AutoModelForCausalLM.from_pretrained(...), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
"""

from __future__ import annotations

from typing import Any

from . import registry
from .auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from .config import PeftConfig, PromptLearningConfig
from .core.injection.plan import dry_run
from .core.model.functions import (
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from .core.model.peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from .core.model.prepare_quantised import prepare_model_for_kbit_training
from .core.model.task_models import (
    PeftMixedModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .core.report.counts import Counts, counts
from .core.report.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from .errors import CheckpointError, NoMatchingPeftModuleError, PeftError, PeftWarning, Refusal
from .mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    get_peft_config,
)
from .registry import PeftType, TaskType
from .upstream.functions import (
    bloom_model_postprocess_past_key_value,
    cast_mixed_precision_params,
    get_base_model_state_dict,
    set_base_model_state_dict,
    shift_tokens_right,
)
from .version import __version__

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "CheckpointError",
    "Counts",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "PromptLearningConfig",
    "Refusal",
    "TaskType",
    "TunerLayerStatus",
    "TunerModelStatus",
    "bloom_model_postprocess_past_key_value",
    "cast_mixed_precision_params",
    "counts",
    "dry_run",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "registry",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
]

# The configs (and whatever else a method's file offers) come from the files themselves.
for _module in registry.modules():
    for _name in getattr(_module, "__all__", ()):
        globals()[_name] = getattr(_module, _name)
        __all__.append(_name)


def __getattr__(name: str) -> Any:
    """Upstream's further names, such as `LoraModel`, from the doors that show them."""
    import importlib

    if not name.startswith("_"):
        for door in ("tuners", "utils"):
            module = importlib.import_module(f".{door}", __name__)
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'peft' has no attribute {name!r}")
