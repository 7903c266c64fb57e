"""Parameter-efficient fine-tuning: any method on any layer of any PyTorch model.

from transformers import AutoModelForCausalLM
from peft import LoraConfig, get_peft_model

model = get_peft_model(AutoModelForCausalLM.from_pretrained(...), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import registry as registry
    from .auto import (
        AutoPeftModel as AutoPeftModel,
        AutoPeftModelForCausalLM as AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification,
    )
    from .config import (
        PeftConfig as PeftConfig,
        PromptLearningConfig as PromptLearningConfig,
    )
    from .core.injection.dry_run import (
        dry_run as dry_run,
    )
    from .core.injection.schedules import (
        update_and_allocate as update_and_allocate,
    )
    from .core.model.functions import (
        get_peft_model as get_peft_model,
        get_peft_model_state_dict as get_peft_model_state_dict,
        inject_adapter_in_model as inject_adapter_in_model,
        load_peft_weights as load_peft_weights,
        set_peft_model_state_dict as set_peft_model_state_dict,
    )
    from .core.model.peft_model import (
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
        PeftModel as PeftModel,
    )
    from .core.model.prepare_quantised import (
        prepare_model_for_kbit_training as prepare_model_for_kbit_training,
    )
    from .core.model.task_models import (
        PeftMixedModel as PeftMixedModel,
        PeftModelForCausalLM as PeftModelForCausalLM,
        PeftModelForFeatureExtraction as PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering as PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification as PeftModelForSequenceClassification,
        PeftModelForTokenClassification as PeftModelForTokenClassification,
    )
    from .core.report.counts import (
        Counts as Counts,
        counts as counts,
    )
    from .core.report.status import (
        TunerLayerStatus as TunerLayerStatus,
        TunerModelStatus as TunerModelStatus,
        get_layer_status as get_layer_status,
        get_model_status as get_model_status,
    )
    from .errors import (
        CheckpointError as CheckpointError,
        NoMatchingPeftModuleError as NoMatchingPeftModuleError,
        PeftError as PeftError,
        PeftWarning as PeftWarning,
        Refusal as Refusal,
    )
    from .mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING as PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING as PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING as PEFT_TYPE_TO_TUNER_MAPPING,
        get_peft_config as get_peft_config,
    )
    from .registry import (
        PeftType as PeftType,
        TaskType as TaskType,
    )
    from .upstream.functions import (
        bloom_model_postprocess_past_key_value as bloom_model_postprocess_past_key_value,
        cast_mixed_precision_params as cast_mixed_precision_params,
        get_base_model_state_dict as get_base_model_state_dict,
        set_base_model_state_dict as set_base_model_state_dict,
        shift_tokens_right as shift_tokens_right,
    )

# Public name -> the module that it is imported from when it is first asked for: torch takes a second to import, which
# `import peft`, its version and `peft --help` need not wait for. The imports above say the same to type checkers.
_HOMES = {
    "auto": """
        AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction
        AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM
        AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification
    """,
    "config": "PeftConfig PromptLearningConfig",
    "core.injection.dry_run": "dry_run",
    "core.injection.schedules": "update_and_allocate",
    "core.model.functions": """
        get_peft_model get_peft_model_state_dict inject_adapter_in_model load_peft_weights
        set_peft_model_state_dict
    """,
    "core.model.peft_model": "MODEL_TYPE_TO_PEFT_MODEL_MAPPING PeftModel",
    "core.model.prepare_quantised": "prepare_model_for_kbit_training",
    "core.model.task_models": """
        PeftMixedModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering
        PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification
    """,
    "core.report.counts": "Counts counts",
    "core.report.status": "TunerLayerStatus TunerModelStatus get_layer_status get_model_status",
    "errors": "CheckpointError NoMatchingPeftModuleError PeftError PeftWarning Refusal",
    "mapping": """
        PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING
        PEFT_TYPE_TO_TUNER_MAPPING get_peft_config
    """,
    "registry": "PeftType TaskType",
    "upstream.functions": """
        bloom_model_postprocess_past_key_value cast_mixed_precision_params get_base_model_state_dict
        set_base_model_state_dict shift_tokens_right
    """,
}
HOMES = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Public names; the configs and whatever else a method's file offers; modules; and upstream's further names."""
    if name == "__all__":
        return sorted([*HOMES, "registry"]) + list(_of_methods())
    if name in HOMES:
        found = getattr(importlib.import_module(f".{HOMES[name]}", __name__), name)
    elif name.startswith("_"):
        raise AttributeError(f"module 'peft' has no attribute {name!r}")
    elif importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f".{name}", __name__)
    else:
        found = _further(name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    modules = (m.name for m in pkgutil.iter_modules(__path__))
    return sorted({*globals(), "__all__", *HOMES, *_of_methods(), *modules})


def _of_methods() -> dict[str, Any]:
    """What the files of methods list in their `__all__`."""
    files = importlib.import_module(".registry", __name__).modules()
    return {name: getattr(file, name) for file in files for name in getattr(file, "__all__", ())}


def _further(name: str) -> Any:
    """A name of a method's file, or one that upstream has at its top, such as `LoraModel`, from the doors that show it."""
    of_methods = _of_methods()
    if name in of_methods:
        return of_methods[name]
    for door in ("tuners", "utils"):
        module = importlib.import_module(f".{door}", __name__)
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module 'peft' has no attribute {name!r}")
