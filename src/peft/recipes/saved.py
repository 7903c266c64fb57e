"""Methods by name, their configs, and adapters on disk with the run that made them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

import peft

from .. import registry
from ..config import Fields, PeftConfig
from ..contract.method import Method
from ..core.anatomy.patterns import for_path
from ..errors import UserError, nearest
from . import bases
from .events import OnEvent, ignore
from .files import text_of
from .job import LAYERS, MOST, NAME, Data, Job, check_data, check_fields, layers, parse
from .job import made as from_fields
from .tasks import find
from .tasks.base import Task

if TYPE_CHECKING:
    from ..core.model.peft_model import PeftModel

ADAPTER, JOB, METRICS, PLOT = "adapter", NAME, "metrics.json", "loss.png"
OLD_FIELDS = {
    "model",
    "task",
    "method",
    "config",
    "data",
    "trainer",
    "output",
    "dtype",
    "seed",
    "evaluate_before",
    "show",
}
ROOTS = ("base_model.model.", "base_model.")  # what adapter keys begin with


def method(name: str) -> tuple[str, type[Method]]:
    """The method of that name, however it is written: `prefix-tuning`, `PREFIX_TUNING`."""
    found = look_up(name)
    if found is not None:
        return found
    raise UserError(
        f"Unknown method {name!r}. {nearest(name.lower(), map(str.lower, registry.methods()))} "
        "`peft methods` lists them all."
    )


def look_up(name: str) -> tuple[str, type[Method]] | None:
    """As `method`, None where there is no method of that name."""
    return {normalised(n): (n, m) for n, m in registry.methods().items()}.get(normalised(name))


def normalised(name: str) -> str:
    """A method's name without what its spellings differ in."""
    return name.lower().replace("-", "").replace("_", "")


def config(job: Job, task: type[Task], steps: int) -> PeftConfig:
    """The method's config from the job; a schedule that counts training steps gets their number."""
    _, found = method(job.method)
    cls, fields = found.config_class, dict(job.config)
    check_fields(fields, cls, "config", reserved={"peft_type": "`method`", "task_type": "`task`"})
    if LAYERS in fields:
        fields[LAYERS] = layers(fields[LAYERS])
    if any(f.name == "total_step" for f in dataclasses.fields(cls)):
        fields.setdefault("total_step", steps)
    return cls(task_type=peft.TaskType(task.type), **fields)


# -- on disk ------------------------------------------------------------------------------------------------------------
@dataclass
class Saved:
    """An adapter folder, its config, and the job that made it where that is known."""

    folder: Path
    config: Fields
    job: Job | None


def open_adapter(path: str) -> Saved:
    """The adapter in a folder: the folder of a run, or that of the adapter itself."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {path!r}. Name the folder that `peft train` wrote, or one with an adapter_config.json."
        )
    if (folder / ADAPTER / "adapter_config.json").is_file():
        folder = folder / ADAPTER
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise UserError(f"{path!r} holds no adapter: expected an adapter_config.json in it or in {path}/{ADAPTER}.")
    try:
        content = json.loads(text_of(file, 16 << 20))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, expected the fields of an adapter's config.")
    made = folder.parent / JOB
    raw = parse(text_of(made, MOST), str(made)) if folder.name == ADAPTER and made.is_file() else None
    if (
        made.is_file()
        and folder.name == ADAPTER
        and (not isinstance(raw, dict) or not isinstance(raw.get("data"), dict))
    ):
        raise UserError(
            f"{made} does not hold the job that made this adapter (a crash may have cut it short), so it is not known how "
            f"rows became prompts. Put it back, or delete it and give --template and --choice."
        )
    try:
        return Saved(folder, content, from_fields(raw) if isinstance(raw, dict) else None)
    except UserError as error:
        raise UserError(f"{made}: {error}") from None


def is_old_run(folder: Path) -> bool:
    """Whether a folder without a marker is that of a run which wrote none: its job's record names every field."""
    file = folder / JOB
    if not file.is_file() or any(p.is_symlink() for p in (file, folder / "checkpoints", folder / ADAPTER)):
        return False
    try:
        text = file.read_text(encoding="utf-8")
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError):
        return False
    if not text.strip("\0 \n"):  # a crash while it was written leaves it so
        return any((folder / "checkpoints").glob("checkpoint-*/trainer_state.json"))
    return isinstance(raw, dict) and raw.keys() >= OLD_FIELDS and isinstance(raw["data"], dict)


@dataclass
class Entry:
    """One tensor of an adapter file: the layer it belongs to, its name there, and what it holds."""

    layer: str
    name: str
    sizes: tuple[int, ...]
    dtype: str
    count: int
    norm: float  # Frobenius
    finite: bool


def entries(folder: Path) -> tuple[list[Entry], Path, dict[str, str]]:
    """Every tensor of the adapter in a folder, one in memory at a time; the weights file, and its header's own words."""
    from safetensors import SafetensorError, safe_open

    safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if safe.is_file():
        try:
            with safe_open(str(safe), framework="pt") as file:
                found = [_entry(key, file.get_tensor(key)) for key in file.keys()]  # noqa: SIM118 - no dict
                return found, safe, file.metadata() or {}
        except SafetensorError as error:
            raise UserError(
                f"{safe} cannot be read ({error}): it is damaged or cut short. Fetch or save it again."
            ) from None
    if pickled.is_file():
        state = torch.load(pickled, map_location="cpu", weights_only=True)
        return [_entry(key, tensor) for key, tensor in state.items()], pickled, {}
    raise UserError(f"{folder} has no weights: expected adapter_model.safetensors (or adapter_model.bin).")


def _entry(key: str, tensor: torch.Tensor) -> Entry:
    root = next((r for r in ROOTS if key.startswith(r)), "")
    parts = key[len(root) :].split(".")
    last = len(parts) - 1
    while last > 0 and (parts[last] in ("weight", "bias") or parts[last].isdigit()):
        last -= 1
    values = tensor.double() if tensor.is_floating_point() else tensor.to(torch.float64)
    return Entry(
        layer=".".join(parts[:last]),
        name=".".join(p for p in parts[last:] if p != "weight"),
        sizes=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        count=tensor.numel(),
        norm=values.norm().item(),
        finite=bool(torch.isfinite(values).all()),
    )


def rank(config: Fields, layer: str) -> int | None:
    """The rank that a saved config gives a layer, by `rank_pattern` or `r`; None where it gives none."""
    found = for_path(config.get("rank_pattern"), layer, config.get("r"))
    return found if isinstance(found, int) else None


# -- in use -------------------------------------------------------------------------------------------------------------
@dataclass
class Loaded:
    """A base with an adapter on it, ready to predict, and the task that it was trained for."""

    model: PeftModel
    task: Task
    source: bases.Source


def load(
    saved: Saved,
    *,
    model: str | None = None,
    dtype: str = "auto",
    data: Fields | None = None,
    on_event: OnEvent = ignore,
) -> Loaded:
    """The base with the adapter on it, and the task that it was trained for."""
    spec = model or saved.config.get("base_model_name_or_path") or (saved.job.model if saved.job else None)
    if not spec:
        raise UserError(f"The adapter in {saved.folder} does not name its base model. Give --model.")
    try:
        source = bases.resolve(spec)
    except UserError as error:
        if model:
            raise
        raise UserError(f"{error} The adapter in {saved.folder} names it as its base; --model names another.") from None
    kind = find.find(saved.config.get("task_type"), bases.load_config(source), source.gguf is not None)
    known = saved.job.data if saved.job else Data()
    known = Data(**({**known.__dict__} | {k: v for k, v in (data or {}).items() if v is not None}))
    check_data(known)
    tokenizer = bases.load_tokenizer(source)
    task = kind(known, tokenizer, known.choices, on_event)
    if task.labels is None and not task.generates:
        raise UserError(
            "The adapter does not come with its labels. Give them in order: --choice NAME --choice NAME ..."
        )
    base = bases.load_base(source, kind.auto, dtype, **task.model_arguments())
    return Loaded(peft.PeftModel.from_pretrained(base, str(saved.folder)).eval(), task, source)
