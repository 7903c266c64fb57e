"""Upstream's import paths: `peft.tuners.<method>` and its `config`, `layer`, `model`, for every method file there is."""

from __future__ import annotations

from torch import nn

from .. import registry
from ..core.model.tuner import Tuner
from ..errors import PeftError, PeftWarning
from ..upstream.classes import LayerView, door, layer_view
from . import tuners_utils


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's


EXTRA: dict[str, dict[str, LayerView]] = {
    "lora": {
        "Linear": layer_view("Linear", "lora_", _is_linear),
        "Embedding": layer_view("Embedding", "lora_", nn.Embedding),
        "Conv1d": layer_view("Conv1d", "lora_", nn.Conv1d),
        "Conv2d": layer_view("Conv2d", "lora_", nn.Conv2d),
        "Conv3d": layer_view("Conv3d", "lora_", nn.Conv3d),
        "MultiheadAttention": layer_view("MultiheadAttention", "lora_", nn.MultiheadAttention),
    }
}
ENCODERS = {  # upstream's names of what is in `model.prompt_encoder`
    "prompt_tuning": "PromptEmbedding",
    "p_tuning": "PromptEncoder",
    "prefix_tuning": "PrefixEncoder",
    "multitask_prompt_tuning": "MultitaskPromptEmbedding",
}
MixedModel = Tuner  # adapters of any methods mix in every model

for _source in registry.modules():
    _file = _source.__name__.rsplit(".", 1)[-1]
    _made = door(f"{__name__}.{_file}", _source, EXTRA.get(_file), ENCODERS.get(_file, ""))
    if _made is not None:
        globals()[_file] = _made
        globals().update({n: getattr(_made, n) for n in _made.__all__ if n not in EXTRA.get(_file, ())})
