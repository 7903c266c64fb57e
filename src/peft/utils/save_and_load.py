"""What other libraries import from here."""

from ..core.files.adapter_files import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from ..core.model.functions import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from ..mapping import PEFT_TYPE_TO_TUNER_MAPPING
from ..upstream.functions import get_base_model_state_dict, set_base_model_state_dict

__all__ = [
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
