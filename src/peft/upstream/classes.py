"""Upstream's class names as views: `isinstance(module, LoraLayer)` asks what a layer holds, not what it is.

A view's `prefix` is the beginning of upstream's parameter names. `door` makes the module that upstream has for a method,
from the method's own file.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NoReturn, TypeAlias

from torch import nn

from ..config import PeftConfig
from ..contract.capabilities import Follows, NeedsTokens
from ..contract.method import Method
from ..core.adapted.layer import Adapted, Companions
from ..core.adapted.switch import Switch
from ..core.load.transformers_loader import loading
from ..core.model.peft_model import PeftModel
from ..core.model.tuner import Tuner
from ..remote import refuse_others

TOKENS = "trainable_token_indices"  # upstream keeps these rows in a layer of their own
OfBase: TypeAlias = "type | Callable[[nn.Module], bool] | None"


class LayerView(type):
    """Classes whose instances are the adapted layers that hold parameters with the class's prefix."""

    prefix: str = ""
    base: OfBase = None  # and whose base layer is of this type, or passes this test
    part: str = ""  # and that hold a companion brought by this config field

    def __instancecheck__(cls, obj: object) -> bool:
        if not isinstance(obj, Adapted):
            return False
        if isinstance(cls.base, type) and not isinstance(obj.base_layer, cls.base):
            return False
        if cls.base is not None and not isinstance(cls.base, type) and not cls.base(obj.base_layer):
            return False
        if cls.part:
            return cls.part in obj.brought_by
        return any(m.prefix.startswith(cls.prefix) for m in obj.nested_methods())

    def __call__(cls, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError(
            f"{cls.__name__} is a view for isinstance: adapters are put into a model with get_peft_model or "
            "inject_adapter_in_model."
        )

    def __getattr__(cls, name: str) -> Any:
        return getattr(Adapted, name)  # what all layers have

    def __setattr__(cls, name: str, value: object) -> None:
        raise AttributeError(
            f"{cls.__name__} is a view: patching {name} on it would reach no layer. A method of one's own is a file: "
            "see docs/add-a-method.md."
        )


class TunerLayerView(type):
    """The layers that an adapter targets, not those whose heads, biases or token rows merely train along."""

    def __instancecheck__(cls, obj: object) -> bool:
        if cls is not BaseTunerLayer:  # a class that someone derived from the view
            return super().__instancecheck__(obj)
        if not isinstance(obj, Adapted):
            return isinstance(obj, Switch) and not isinstance(
                obj, Companions
            )  # where a method of the whole model hangs
        held = list(obj.nested_methods())
        rows = [m for m in held if isinstance(m, NeedsTokens)]
        if rows and all(isinstance(m, Follows) and m.follows for m in rows):  # a head that reads a table's rows
            return obj.targeted and len(rows) < len(held)
        return obj.targeted or TOKENS in obj.brought_by


class AuxiliaryView(type):
    """The layers that hold a head or token rows; and all that hold an adapter, while transformers loads it: its loader
    asks such layers alone for where tensors go."""

    def __instancecheck__(cls, obj: object) -> bool:
        if cls is not AuxiliaryTrainingWrapper:
            return super().__instancecheck__(obj)
        if not isinstance(obj, Adapted):
            return (
                isinstance(obj, Switch)
                and not isinstance(obj, Companions)
                and loading.into(obj.roster, obj.roster.adapters)
            )
        return bool({"modules_to_save", TOKENS} & set(obj.brought_by) or loading.into(obj.roster, obj.methods))


class AuxiliaryTrainingWrapper(Switch, metaclass=AuxiliaryView):
    """What trains besides the method."""


class BaseTunerLayer(Switch, metaclass=TunerLayerView):
    """What switches adapters at a layer."""


class ModelView(type):
    """Classes whose instances are tuners with an adapter of the class's prefix; calling one makes such a tuner."""

    prefix: str = ""

    def __instancecheck__(cls, obj: object) -> bool:
        roster = obj.model.__dict__.get("_peft_roster") if isinstance(obj, Tuner) else None
        return roster is not None and any(
            m.prefix == cls.prefix for a in roster.adapters.values() for _, m in a.methods
        )

    def __call__(
        cls,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig] | None = None,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: object = None,
        *,
        config: PeftConfig | dict[str, PeftConfig] | None = None,
        **options: bool,
    ) -> Tuner:
        peft_config = config if peft_config is None else peft_config
        if peft_config is None:
            raise TypeError(f"{cls.__name__} needs a config.")
        options["low_cpu_mem_usage"] = low_cpu_mem_usage
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        wrapped: PeftModel | None = None
        for name, own in configs.items():
            wrapped = PeftModel(model, own, name, **_known(options)) if wrapped is None else wrapped
            if name not in wrapped.peft_config:
                wrapped.add_adapter(name, own)
        assert wrapped is not None
        return wrapped.base_model


def _known(options: dict[str, bool]) -> dict[str, bool]:
    refuse_others("This class", options, ("low_cpu_mem_usage", "autocast_adapter_dtype"))
    return options


def layer_view(name: str, prefix: str = "", base: OfBase = None, part: str = "", **members: object) -> LayerView:
    return LayerView(name, (), {"prefix": prefix, "base": base, "part": part, "__doc__": LayerView.__doc__, **members})


def model_view(name: str, prefix: str) -> ModelView:
    return ModelView(name, (), {"prefix": prefix, "__doc__": ModelView.__doc__})


def door(
    package: str, source: ModuleType, extra: Mapping[str, object] | None = None, method_name: str = ""
) -> ModuleType | None:
    """`package` as upstream has it, with its `config`, `layer` and `model`: the method file's names and two views.

    method_name: upstream's name of the method's own module.
    """
    methods = [c for c in vars(source).values() if isinstance(c, type) and issubclass(c, Method) and c.peft_type]
    own = [c for c in methods if c.__module__ == source.__name__ and hasattr(c, "config_class")]
    if not own:
        return None
    names: dict[str, object] = {n: getattr(source, n) for n in getattr(source, "__all__", ())}
    for cls in own:
        known_as = cls.config_class.__name__.removesuffix("Config")
        names[f"{known_as}Layer"] = layer_view(
            f"{known_as}Layer",
            cls.prefix,
            adapter_layer_names=cls.table.layer_names(),
            other_param_names=cls.shown.settings,
        )
        names[f"{known_as}Model"] = model_view(f"{known_as}Model", cls.prefix)
    names.update(extra or {})
    if method_name:
        names[method_name] = own[0]
    made = _module(package, source.__doc__, names)
    for part in ("config", "layer", "model"):
        setattr(made, part, _module(f"{package}.{part}", source.__doc__, names))
    return made


def _module(name: str, doc: str | None, names: Mapping[str, object]) -> ModuleType:
    made = ModuleType(name, doc)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    made.__path__ = []
    made.__dict__.update(names, __all__=sorted(names))
    sys.modules[name] = made
    return made
