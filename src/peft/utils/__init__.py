"""Upstream's import paths for helpers; the code is in `peft.core`."""

from ..auto import TOKENIZER_CONFIG_NAME
from ..core.model.functions import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from ..core.model.prepare_quantised import prepare_model_for_kbit_training
from ..mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from ..registry import PeftType, TaskType
from ..upstream.functions import get_base_model_state_dict, set_base_model_state_dict
from .constants import (
    DUMMY_MODEL_CONFIG,
    DUMMY_TARGET_MODULES,
    SEQ_CLS_HEAD_NAMES,
    TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,
)
from .constants import __getattr__ as __getattr__
from .error import NoMatchingPeftModuleError, PeftError
from .other import (
    CONFIG_NAME,
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    _freeze_adapter,
    _get_batch_size,
    _get_submodules,
    _set_adapter,
    bloom_model_postprocess_past_key_value,
    cast_mixed_precision_params,
    fsdp_auto_wrap_policy,
    id_tensor_storage,
    infer_device,
    shift_tokens_right,
    transpose,
)
from .warning import PeftWarning
