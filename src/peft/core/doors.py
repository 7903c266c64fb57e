"""Upstream's class names as views: `isinstance(module, LoraLayer)` asks what a layer holds, not what it is.

A view's `stem` is the beginning of upstream's parameter names. `door` makes the module that upstream has for a method,
from the method's own file.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

from torch import nn

from .adapted import Adapted
from .method import Method
from .model import PeftModel, Tuner


class LayerView(type):
    """Classes whose instances are the adapted layers that hold parameters with the class's stem."""

    stem: str = ""
    base: type[nn.Module] | tuple[type[nn.Module], ...] | None = None  # and whose base layer is of this type
    part: str = ""  # and that hold a companion brought by this config field

    def __instancecheck__(cls, obj: Any) -> bool:
        if not isinstance(obj, Adapted):
            return False
        if cls.base is not None and not isinstance(obj.base_layer, cls.base):
            return False
        if cls.part:
            return any(n.endswith(f"%{cls.part}") for n in obj.adapters._modules)
        return any(n.rsplit(".", 1)[-1].startswith(cls.stem) for n, _ in obj.adapters.named_parameters())


class ModelView(type):
    """Classes whose instances are tuners with an adapter of the class's stem; calling one makes such a tuner."""

    stem: str = ""

    def __instancecheck__(cls, obj: Any) -> bool:
        hub = obj.model.__dict__.get("_peft_hub") if isinstance(obj, Tuner) else None
        return hub is not None and any(m.prefix == cls.stem for a in hub.adapters.values() for _, m in a.methods)

    def __call__(cls, model: nn.Module, peft_config: Any, adapter_name: str = "default", **options: Any) -> Tuner:
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        wrapped: Any = None
        for name, config in configs.items():
            wrapped = PeftModel(model, config, name, **_known(options)) if wrapped is None else wrapped
            if name not in wrapped.peft_config:
                wrapped.add_adapter(name, config)
        return wrapped.base_model


def _known(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k in ("low_cpu_mem_usage", "autocast_adapter_dtype")}


def layer_view(name: str, stem: str = "", base: Any = None, part: str = "", **members: Any) -> Any:
    return LayerView(name, (), {"stem": stem, "base": base, "part": part, "__doc__": LayerView.__doc__, **members})


def model_view(name: str, stem: str) -> Any:
    return ModelView(name, (), {"stem": stem, "prefix": stem, "__doc__": ModelView.__doc__})


def door(package: str, source: ModuleType, extra: dict[str, Any] | None = None) -> ModuleType | None:
    """`package` as upstream has it, with its `config`, `layer` and `model`: the method file's names and two views."""
    methods = [c for c in vars(source).values() if isinstance(c, type) and issubclass(c, Method) and c.peft_type]
    own = [c for c in methods if c.__module__ == source.__name__ and hasattr(c, "config_class")]
    if not own:
        return None
    names = {n: getattr(source, n) for n in getattr(source, "__all__", ())}
    for cls in own:
        known_as = cls.config_class.__name__.removesuffix("Config")
        keys = tuple(dict.fromkeys(k.split(".")[0] for k in cls.keys.values()))
        names[f"{known_as}Layer"] = layer_view(f"{known_as}Layer", cls.prefix, adapter_layer_names=keys)
        names[f"{known_as}Model"] = model_view(f"{known_as}Model", cls.prefix)
    names.update(extra or {})
    made = _module(package, source.__doc__, names)
    for part in ("config", "layer", "model"):
        setattr(made, part, _module(f"{package}.{part}", source.__doc__, names))
    return made


def _module(name: str, doc: str | None, names: dict[str, Any]) -> ModuleType:
    made = ModuleType(name, doc)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    made.__path__ = []
    made.__dict__.update(names, __all__=sorted(names))
    sys.modules[name] = made
    return made
