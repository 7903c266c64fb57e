"""Upstream's import paths: `peft.tuners.<method>` and its `config`, `layer`, `model`, for every method file there is."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from torch import nn

from .. import registry, utils
from ..core.model.tuner import Tuner
from ..errors import PeftError, PeftWarning
from ..upstream.classes import LayerView, door, layer_view
from ..utils import other
from . import tuners_utils


def _shared(name: str) -> object:
    """A name that upstream's module of a method has from elsewhere: `TRANSFORMERS_MODELS_TO_…_MAPPING`, `BaseTunerLayer`."""
    for home in (tuners_utils, other, utils):
        if not name.startswith("__") and hasattr(home, name):
            return getattr(home, name)
    raise AttributeError(f"upstream's modules of methods have no {name!r} here")


def _forward(made: ModuleType) -> None:
    for module in (made, *(getattr(made, part) for part in ("config", "layer", "model"))):
        module.__dict__["__getattr__"] = _shared


def _named(name: str) -> Callable[[nn.Module], bool]:
    return lambda module: type(module).__name__ == name


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
        "Linear4bit": layer_view("Linear4bit", "lora_", _named("Linear4bit")),
        "Linear8bitLt": layer_view("Linear8bitLt", "lora_", _named("Linear8bitLt")),
    }
}
LAYERS: dict[str, type | Callable[[nn.Module], bool]] = {  # upstream's class -> what its base is
    **{"Linear": _is_linear, "Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d, "Embedding": nn.Embedding},
    **{"HRALinear": _is_linear, "HRAConv2d": nn.Conv2d, "SVDLinear": _is_linear},
}
OF_METHODS = {
    "ia3_": "ia3 Linear Conv2d Conv3d",
    "hada_": "loha Linear Conv1d Conv2d",
    "lokr_": "lokr Linear Conv1d Conv2d",
    "oft_": "oft Linear Conv2d Embedding",
    "boft_": "boft Linear Conv2d",
    "vera_lambda_": "vera Linear",
    "hra_": "hra HRALinear HRAConv2d",
    "lora_": "adalora SVDLinear",
}
for _prefix, _words in OF_METHODS.items():
    _method, *_classes = _words.split()
    EXTRA[_method] = {c: layer_view(c, _prefix, LAYERS[c]) for c in _classes}
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
        _forward(_made)
        globals()[_file] = _made
        globals().update({n: getattr(_made, n) for n in _made.__all__ if n not in EXTRA.get(_file, ())})
