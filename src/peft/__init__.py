"""Parameter-efficient fine-tuning: any method on any layer of any PyTorch model.

from transformers import AutoModelForCausalLM
from peft import LoraConfig, get_peft_model

model = get_peft_model(AutoModelForCausalLM.from_pretrained(...), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
"""

from __future__ import annotations

__version__ = "1.0.0"

from typing import Any

from . import registry
from .config import PeftConfig, PromptLearningConfig
from .core.errors import CheckpointError, NoMatchingPeftModuleError, Refusal
from .core.inject import dry_run
from .core.model import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftMixedModel,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from .registry import PeftType, TaskType

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "CheckpointError",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PromptLearningConfig",
    "Refusal",
    "TaskType",
    "dry_run",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "registry",
    "set_peft_model_state_dict",
]

# The configs (and whatever else a method's file offers) come from the files themselves.
for _module in registry.modules():
    for _name in getattr(_module, "__all__", ()):
        globals()[_name] = getattr(_module, _name)
        __all__.append(_name)


def __getattr__(name: str) -> Any:
    raise AttributeError(f"module 'peft' has no attribute {name!r}")
