"""Upstream's path to the models; the code is in `peft.core.model` and `peft.core.report`."""

from . import utils
from .core.model.peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from .core.model.task_models import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .core.report.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "TunerLayerStatus",
    "TunerModelStatus",
    "get_layer_status",
    "get_model_status",
]


def __getattr__(name: str) -> object:
    """What upstream's module has from its helpers, such as `set_peft_model_state_dict`."""
    if not name.startswith("_") and hasattr(utils, name):
        return getattr(utils, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
