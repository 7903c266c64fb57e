"""What other libraries import from here."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.model.prepare_quantised import prepare_model_for_kbit_training
from ..functional import set_adapter as _set_adapter
from ..functional import set_requires_grad
from ..upstream.classes import AuxiliaryTrainingWrapper, layer_view
from ..upstream.functions import cast_mixed_precision_params, fsdp_auto_wrap_policy, shift_tokens_right
from ..upstream.functions import get_submodules as _get_submodules
from .constants import (
    CONFIG_NAME,
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,
    WEIGHTS_NAME,
    bloom_model_postprocess_past_key_value,
    starcoder_model_postprocess_past_key_value,
)
from .constants import __getattr__ as __getattr__

__all__ = [
    "CONFIG_NAME",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "TrainableTokensWrapper",
    "_freeze_adapter",
    "_get_batch_size",
    "_get_submodules",
    "_set_adapter",
    "bloom_model_postprocess_past_key_value",
    "cast_mixed_precision_params",
    "fsdp_auto_wrap_policy",
    "id_tensor_storage",
    "infer_device",
    "prepare_model_for_kbit_training",
    "shift_tokens_right",
    "starcoder_model_postprocess_past_key_value",
    "transpose",
]

ModulesToSaveWrapper = layer_view("ModulesToSaveWrapper", part="modules_to_save")
TrainableTokensWrapper = layer_view("TrainableTokensWrapper", part="trainable_token_indices")


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Stop training an adapter."""
    set_requires_grad(model, adapter_name, False)


def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """The rows of a batch, given in one of two ways."""
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ValueError("Pass input_ids or inputs_embeds.")
    return int(given.shape[0])


def infer_device() -> str:
    """The accelerator that is there, or "cpu"."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found is not None else "cpu"


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What is equal for tensors that share memory."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The weight as [out, in]."""
    return (nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T) if fan_in_fan_out else weight
