"""Finding and loading the base model: a hub id, a folder, a GGUF file, or a Python package that ships one."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch

from ..errors import UserError
from .writing import digest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ..core.model.peft_model import PeftModel

SMALL = 16 << 20  # bytes: files that are read whole to tell whether they have changed
Model: TypeAlias = "PreTrainedModel | PeftModel"  # what tasks run: a base, or a base with adapters


class Unplaced(Protocol):
    """A model as it was loaded, before it goes to its device."""

    config: PreTrainedConfig
    hf_quantizer: object

    def to(self, device: torch.device) -> PreTrainedModel: ...


class AutoClass(Protocol):
    """One of transformers' auto classes."""

    def from_config(self, config: PreTrainedConfig) -> PreTrainedModel: ...

    def from_pretrained(self, path: str, **settings: object) -> Unplaced: ...


@dataclass(frozen=True)
class Source:
    """Where transformers finds a model: `from_pretrained(path, gguf_file=gguf)`."""

    path: str
    gguf: str | None = None

    @property
    def arguments(self) -> dict[str, str]:
        return {"gguf_file": self.gguf} if self.gguf else {}


def resolve(spec: str) -> Source:
    """What a job calls its model, as something that transformers can load."""
    here = Path(spec).expanduser()
    if here.is_file():
        if here.suffix != ".gguf":
            raise UserError(f"The model {spec!r} is a file but no GGUF file. Name a folder, a .gguf file or a hub id.")
        return Source(str(here.parent), here.name)
    if here.is_dir():
        return _folder(here, spec)
    if spec.endswith(".gguf"):
        repository, _, name = spec.rpartition("/")
        if repository.count("/") == 1 and not spec.startswith((".", "/", "~")):
            return Source(repository, name)  # owner/repository/file.gguf on the hub
        raise UserError(f"There is no GGUF file {spec!r}. Check the path, relative to the current folder.")
    if spec.startswith((".", "/", "~")) or "\\" in spec or spec.endswith("/") or spec.count("/") > 1:
        raise UserError(f"There is no folder or GGUF file {spec!r}. Check the path, relative to the current folder.")
    return _package(spec) or Source(spec)


def digests(source: Source) -> dict[str, str]:
    """What tells a model on this disk from another: its files by their full paths, small ones with the digest of their
    bytes, large ones with their size."""
    folder = Path(source.path)
    files = [folder / source.gguf] if source.gguf else sorted(folder.glob("*"))
    return {
        str(f.absolute()): digest(f) if f.stat().st_size <= SMALL else f"{f.stat().st_size} bytes"
        for f in files
        if f.suffix in (".json", ".safetensors", ".bin", ".gguf", ".model", ".txt") and f.is_file()
    }


def _folder(folder: Path, spec: str) -> Source:
    if _is_model(folder):
        return Source(str(folder))
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return Source(str(folder), files[0].name)
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{spec!r} is an adapter, not a base model; its adapter_config.json names the base it needs.")
    found = f"it has {len(files)} GGUF files: name one of them" if files else "it has neither"
    raise UserError(f"The folder {spec!r} holds no model: expected a config.json or one GGUF file; {found}.")


def _package(spec: str) -> Source | None:
    """The model shipped by an installed Python package of that name, found without importing it."""
    name = spec.replace("-", "_")
    if not name.isidentifier():
        return None
    found = importlib.util.find_spec(name)
    for root in (found.submodule_search_locations or []) if found else []:
        files = sorted(Path(root).rglob("*.gguf"))
        if len(files) == 1:
            return Source(str(files[0].parent), files[0].name)
        if len(files) > 1:
            raise UserError(
                f"The package {spec!r} ships {len(files)} GGUF files; name one: {', '.join(map(str, files))}."
            )
        for config in sorted(Path(root).rglob("config.json"), key=lambda p: len(p.parts)):
            if _is_model(config.parent):
                return Source(str(config.parent))
    return None


def _is_model(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and "model_type" in json.loads(config.read_text(encoding="utf-8"))


def load_config(source: Source) -> PreTrainedConfig:
    """The model's config; a fresh copy at each call. Reading one from a GGUF file takes seconds."""
    return copy.deepcopy(_config(source))


@functools.cache
def _config(source: Source) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.path, **source.arguments)
    except Exception as error:
        if Path(source.path).exists() or not _is_about_the_hub(error):
            raise
        raise UserError(
            f"There is no folder {source.path!r} in {Path.cwd()}, no installed package of that name that ships a model, and "
            f"the model hub does not give it either: {str(error).strip() or type(error).__name__}"
        ) from None


def _is_about_the_hub(error: Exception) -> bool:
    """Errors of the hub's client, however it speaks to the network."""
    known = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")
    return isinstance(error, OSError) or any(c.__module__.split(".")[0] in known for c in type(error).__mro__)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.path, **source.arguments)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer of {source.path!r} has neither a padding nor an end token; batches need one."
            )
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
    return tokenizer


def load_base(
    source: Source, auto: str, dtype: str = "auto", *, meta: bool = False, **overrides: object
) -> PreTrainedModel:
    """The base model by transformers' auto class `auto`. `meta` gives its modules without weights (for a dry run)."""
    import transformers

    auto_class: AutoClass = getattr(transformers, auto)
    if meta:
        config = load_config(source)
        for name, value in overrides.items():
            setattr(config, name, value)
        with torch.device("meta"):
            return auto_class.from_config(config)
    if source.gguf:
        return _unpacked(auto_class, source, dtype, overrides).to(device())
    return auto_class.from_pretrained(source.path, dtype=torch_dtype(dtype), **overrides).to(device())


def _unpacked(auto_class: AutoClass, source: Source, dtype: str, overrides: dict[str, object]) -> Unplaced:
    """A GGUF file as a plain model. Packed blocks can be run but not trained, and transformers marks even an unpacked
    model as quantised, which then can be neither trained nor saved: the mark is taken off."""
    import transformers

    if hasattr(transformers, "GgufConfig"):
        overrides = {"quantization_config": transformers.GgufConfig(dequantize=True), **overrides}
    overrides = {"config": load_config(source), "dtype": torch_dtype(dtype), **overrides}
    model = auto_class.from_pretrained(source.path, gguf_file=source.gguf, **overrides)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
        del model.config.quantization_config
    return model


def torch_dtype(name: str) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if device().type == "cpu" else "auto"
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype {name!r}: expected auto, float32, bfloat16 or float16.")
    return found


def device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")
