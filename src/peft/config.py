"""Configs: plain dataclasses that round-trip through `adapter_config.json`, validated when they are made."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

from .config_fields import Names, checks_of, default_of, jsonable, own_field, ranged, reading
from .config_values import AtLeast0, shown
from .errors import ConfigError, about_a_file, near, printable
from .local_files import read_json, replace_files
from .registry import PeftType, TaskType, method
from .remote import CODE_KWARGS, HUB_KWARGS, find_file, push_folder, refuse_others
from .version import __version__

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

CONFIG_NAME = "adapter_config.json"
COMMON = 7  # fields that go by position, as upstream: task_type to inference_mode

Config = TypeVar("Config", bound="PeftConfig")
Fields: TypeAlias = dict[str, Any]  # a config's values by the names of its fields, as JSON has them


class _Signature:
    """The signature of a class's `__init__`."""

    def __get__(self, obj: object, cls: type) -> inspect.Signature:
        found = inspect.signature(cls.__init__)  # type: ignore[misc]
        return found.replace(parameters=list(found.parameters.values())[1:])


def _task_type(cls: type[PeftConfig], value: str | TaskType | None) -> TaskType | None:
    if value is None or isinstance(value, TaskType):
        return value
    if value not in TaskType.__members__:
        known = ", ".join(TaskType.__members__)
        raise ConfigError(
            f"Invalid task type: {shown(value)}. Expected one of: {known}.{near(value[:80], TaskType.__members__)}"
        )
    return TaskType(value)


def _peft_type(cls: type[PeftConfig], value: str | PeftType | None) -> PeftType | None:
    if value is None:
        return None
    if not cls.own_type:
        return PeftType(method(value).peft_type)
    if value != cls.own_type:
        raise ConfigError(f"{cls.__name__} is for method {cls.own_type}, not {shown(value)[1:-1]}.")
    return PeftType(value)


def as_bias(cls: type[PeftConfig], value: str) -> str:
    if value not in ("none", "all") and not value.endswith("_only"):
        raise ConfigError(f"bias={shown(value)}: expected 'none', 'all' or '<method>_only'.")
    return value


@dataclass
class PeftConfig:
    """What every config has.

    task_type: what the model is for (`TaskType`), decides the `PeftModelFor*` class. inference_mode: the adapter is
    not trained. base_model_name_or_path, revision: where the base came from.
    """

    task_type: str | TaskType | None = reading(_task_type)
    peft_type: str | PeftType | None = reading(_peft_type)
    auto_mapping: dict[str, object] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    saved_embeddings: list[str] | None = dataclasses.field(
        default=None, init=False, metadata={"transient": True, "own": True}
    )

    own_type: ClassVar[str] = ""  # the method's name, set by the config class of a method

    __signature__ = _Signature()  # of __init__, not of what guards it

    def __new__(cls: type[Config], *args: object, **kwargs: object) -> Config:
        if len(args) > COMMON:
            raise TypeError(
                f"{cls.__name__}: pass the fields after `inference_mode` by name; their order is no promise."
            )
        return super().__new__(cls)

    def __setattr__(self, name: str, value: object) -> None:
        """Every value is checked when it is set: its type, that it is finite, in its range, and can be stored."""
        check = checks_of(type(self)).get(name)
        object.__setattr__(self, name, value if check is None else check(value))

    def __post_init__(self) -> None:
        if self.own_type:
            self.peft_type = PeftType(self.own_type)
        if self.peft_version is None:
            self.peft_version = self._get_peft_version()

    def check(self) -> None:
        """Check the values again: lists and dictionaries may have been changed in place since they were set."""
        for name in checks_of(type(self)):
            setattr(self, name, getattr(self, name))

    # -- what kind of method --------------------------------------------------------------------------------------------
    @property
    def is_prompt_learning(self) -> bool:
        return self.peft_type is not None and method(self.peft_type).form == "prompt"

    @property
    def is_adaption_prompt(self) -> bool:
        return False

    # -- JSON -----------------------------------------------------------------------------------------------------------
    def to_dict(self) -> Fields:
        """Plain values of what makes an equal config: upstream's fields, and others where they differ from their default."""
        out = {}
        for f in dataclasses.fields(self):
            value = jsonable(getattr(self, f.name))
            if f.metadata.get("transient"):
                continue
            if f.metadata.get("own") and value == jsonable(default_of(f)):
                continue
            out[f.name] = value
        return out

    def to_json_dict(self) -> Fields:
        """What goes to disk."""
        return self.to_dict()

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: object) -> None:
        """Write `adapter_config.json`, aside and then renamed. `auto_mapping_dict` fills `auto_mapping`."""
        refuse_others("save_pretrained()", kwargs, ("auto_mapping_dict",))
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        os.makedirs(save_directory, exist_ok=True)
        out = self.to_json_dict()
        if kwargs.get("auto_mapping_dict") is not None:
            out["auto_mapping"] = checks_of(type(self))["auto_mapping"](kwargs["auto_mapping_dict"])
        replace_files(os.fspath(save_directory), {CONFIG_NAME: lambda path: _write(out, path)})

    def write_json(self, path: str) -> None:
        """Write what goes to disk into a file."""
        _write(self.to_json_dict(), path)

    @classmethod
    def from_dict(cls, values: Fields, strict: bool = False, source: str = CONFIG_NAME) -> Any:
        """The config object of whatever method the values name.

        A field nobody knows is dropped with a warning that names it, or refused with `strict=True`.
        """
        values = dict(values)
        kind = values.get("peft_type")
        if kind is not None:
            require_method(values, source)
        target = method(kind).config_class if kind is not None else cls
        known = {f.name for f in dataclasses.fields(target) if f.init}
        unknown = [k for k in values if k not in known]
        if unknown:
            hints = "".join(near(u, known) for u in unknown[:8])
            named = ", ".join(repr(u[:100]) for u in unknown[:40]) + (" …" if len(unknown) > 40 else "")
            text = printable(f"{source}: {target.__name__} does not know the field(s) {named}.{hints}")
            if strict:
                raise ValueError(text + " Remove them, or load with strict=False to drop them.")
            warnings.warn(text + " They are ignored.", stacklevel=3)
        try:
            with about_a_file(source):
                return target(**{k: v for k, v in values.items() if k in known})
        except ConfigError as e:
            raise ConfigError(f"{source}: {e}") from e

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: object) -> Fields:
        """The raw dictionary of a config file. Keyword arguments are those of a download, which is over."""
        refuse_others("from_json_file()", kwargs, (*HUB_KWARGS, *CODE_KWARGS, "subfolder"))
        values = read_json(path_json_file, "the adapter config")
        values.pop("runtime_config", None)
        return values

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: object
    ) -> Any:
        """Read a config from a folder or the hub. Keyword arguments that are fields override the file's values."""
        strict = bool(kwargs.pop("strict", False))
        remote = {k: kwargs.pop(k) for k in HUB_KWARGS if k in kwargs}
        unsaid = [k for k in ("proxies",) if kwargs.get(k) is None]  # transformers passes it on all the same
        kwargs = {k: v for k, v in kwargs.items() if k not in (*CODE_KWARGS, *unsaid)}
        path = find_file(str(pretrained_model_name_or_path), CONFIG_NAME, subfolder, remote)
        if path is None:
            raise ValueError(f"Can't find '{CONFIG_NAME}' at '{pretrained_model_name_or_path}'")
        values = cls.from_json_file(path)
        require_method(values, path)
        refuse_others("from_pretrained()", kwargs, checks_of(method(values["peft_type"]).config_class))
        return cls.from_dict({**values, **kwargs}, strict=strict, source=str(path))

    @classmethod
    def from_peft_type(cls, **kwargs: object) -> Any:
        """The config class of `kwargs["peft_type"]`, made from the other arguments."""
        kind: Any = kwargs.get("peft_type")
        refuse_others("from_peft_type()", kwargs, checks_of(cls if kind is None else method(kind).config_class))
        return cls.from_dict(kwargs, source="from_peft_type")

    @classmethod
    def check_kwargs(cls: type[Config], **kwargs: Any) -> Config:
        return cls(**kwargs)

    @classmethod
    def _get_peft_type(cls, model_id: str, subfolder: str | None = None, **remote: object) -> str:
        refuse_others("_get_peft_type()", remote, (*HUB_KWARGS, *CODE_KWARGS))
        path = find_file(model_id, CONFIG_NAME, subfolder, remote)
        if path is None:
            raise ValueError(f"Can't find '{CONFIG_NAME}' at '{model_id}'")
        values = cls.from_json_file(path)
        require_method(values, path)
        return str(values["peft_type"])

    @staticmethod
    def _get_peft_version() -> str:
        return __version__

    def push_to_hub(self, repo_id: str, **kwargs: object) -> CommitInfo:
        """Upload `adapter_config.json`."""
        return push_folder(self.save_pretrained, repo_id, **kwargs)


def _write(values: Fields, path: str) -> None:
    with open(path, "w", encoding="utf-8") as f:
        f.write(json.dumps(values, indent=2, sort_keys=True))


@dataclass
class TunerConfig(PeftConfig):
    """Fields of every method that is put into layers.

    target_modules: names, a regex or `"all-linear"`. exclude_modules: names or a regex to leave out.
    modules_to_save: modules trained and saved whole. layers_to_transform, layers_pattern: only these layer numbers.
    target_parameters: names of bare parameters (expert stacks). bias: `none`, `all`, or `<method>_only`: which biases
    train along. trainable_token_indices: rows of the embedding to train along. seed: one seed for the whole adapter;
    each site draws from it under its own name.
    """

    sets: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules")  # lists that are held as sets

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[AtLeast0] | AtLeast0 | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = reading(as_bias, "none")
    target_parameters: list[str] | None = own_field(None)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = own_field(None)
    ensure_weight_tying: bool = own_field(False)
    seed: int | None = own_field(None)

    @property
    def names_no_target(self) -> bool:
        """Whether the method's own defaults say what it targets."""
        return self.target_modules is None and not self.target_parameters

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name in self.sets and isinstance(held := self.__dict__[name], (list, tuple, set)):
            self.__dict__[name] = Names(held)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None and self.target_modules != "all-linear":
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")


def require_method(values: Fields, source: str) -> None:
    """Raise unless the values of a file say of which method they are: any other JSON is no adapter's config."""
    if not isinstance(values.get("peft_type"), str):
        raise ConfigError(
            f"{source} names no method: the field 'peft_type' is missing, so it is no adapter's config."
            if values.get("peft_type") is None
            else f"{source}: `peft_type` should be a method's name but the value is {shown(values['peft_type'])}."
        )


@dataclass
class LayoutConfig(TunerConfig):
    """fan_in_fan_out: in upstream's files of most early methods. Each kind of layer knows its layout by itself."""

    fan_in_fan_out: bool = False


@dataclass
class DeltaConfig(TunerConfig):
    """Fields of every method that adds a ΔW. use_dora: DoRA over this delta (arXiv 2402.09353)."""

    use_dora: bool = own_field(False)


@dataclass
class PromptLearningConfig(PeftConfig):
    """Fields of the methods whose site is the whole model; sizes left at None are read from the base model."""

    num_virtual_tokens: int = ranged(None)  # type: ignore[assignment]
    token_dim: int = ranged(None)  # type: ignore[assignment]
    num_transformer_submodules: int | None = ranged(None)
    num_attention_heads: int | None = ranged(None)
    num_layers: int | None = ranged(None)
    modules_to_save: list[str] | None = None
    seed: int | None = own_field(None)
