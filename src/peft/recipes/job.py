"""A fine-tuning job: what `peft train` reads from a YAML file and flags, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

import yaml

from ..errors import UserError, nearest
from . import checks
from .files import text_of
from .outputs import MARKER

if TYPE_CHECKING:
    from ..config import Fields

# Keys that may differ between an interrupted run and the one that continues it.
NOT_PART_OF_THE_RUN = ("output", "keep_checkpoints", "checkpoint_minutes", "show")
NAME = "job.yaml"  # the record of a job in the folder of its run
LAYERS = "layers_to_transform"  # the field of configs that takes ranges in a job


MOST = 256 << 10  # characters of YAML
NODES, DEPTH = 20_000, 40  # values in it, those that aliases repeat counted each time, and how deep they may lie


class Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as text; here it is a number, as in every configuration of a learning rate. A key that stands
    twice in a mapping is an error, and work is bounded: values that aliases repeat count each time."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.count, self.depth, self.sizes = 0, 0, dict[int, int]()

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        alias, before = self.check_event(yaml.AliasEvent), self.count
        self.depth += 1
        if self.depth > DEPTH:
            raise yaml.YAMLError(f"it is nested deeper than {DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if alias and id(node) not in self.sizes:
            raise yaml.YAMLError("an alias stands inside what it repeats")
        self.count += self.sizes[id(node)] if alias else 1
        if self.count > NODES:
            raise yaml.YAMLError(f"it has more than {NODES} values, those that aliases repeat counted each time")
        self.sizes[id(node)] = self.count - before
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands there twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


@dataclass
class Data:
    """Where the rows are and what becomes of them."""

    train: str | None = None  # a JSONL, JSON, CSV or Parquet file, or the name of a data set (`name` or `name:split`)
    eval: str | float | None = None  # likewise, or the fraction of the training rows to hold out
    subset: str | None = None  # the configuration of a named data set
    text: str = "text"  # the column that is read; for token classification a column of lists of words
    target: str | None = "label"  # the column to learn; null trains on the text itself
    template: str | None = None  # the prompt, with columns in braces; `{text}` alone when left out
    choices: list[str] | None = None  # the possible answers: they are scored by their likelihood
    max_length: int = 512  # tokens of prompt and target together; longer prompts lose their beginning
    limit: int | None = None  # use the first rows only
    skip_bad_rows: bool = False  # leave out rows that cannot be right (no text, an unknown label ...), and say how many


@dataclass
class Job:
    """One run of `peft train`."""

    model: str = ""  # a hub id, a folder, a GGUF file, or a Python package that ships a model
    task: str | None = None  # causal_lm, seq2seq_lm, seq_cls or token_cls; read off the model when it is plain
    method: str = "lora"
    config: Fields = field(default_factory=dict)  # fields of the method's config; layers may be ranges: 0-3,8
    data: Data = field(default_factory=Data)
    trainer: Fields = field(default_factory=dict)  # fields of transformers' TrainingArguments
    output: str = "runs/peft"
    dtype: str = "auto"  # of the base model: float32, bfloat16, float16; auto is float32 on a CPU, else the model's own
    seed: int = 0
    evaluate_before: bool = True  # score the held-out rows with the base model too
    show: int = 2  # answers to held-out rows to print at the end
    keep_checkpoints: bool = False  # they are removed when the run has finished
    checkpoint_minutes: float = 3  # a checkpoint is written at least this often, besides those of `trainer.save_steps`

    def as_dict(self) -> Fields:
        return dataclasses.asdict(self)

    def located(self) -> Fields:
        """As `as_dict`, with the full paths of files and folders, so that it means the same read from anywhere."""
        found = self.as_dict()
        found["model"] = located(self.model)
        found["data"] |= {n: located(v) for n, v in found["data"].items() if n in ("train", "eval") and v is not None}
        found["trainer"] = {n: located(v) if str(v).endswith(".json") else v for n, v in found["trainer"].items()}
        return found | {"output": str(Path(self.output).expanduser().absolute())}

    def differences(self, other: Fields) -> list[str]:
        """The keys, dotted, in which `other` is another run than this one; ranges of layers may be written otherwise, and
        so may paths: in full, or as this job has them."""
        found = (_differing(_with_layers(own), _with_layers(other)) for own in (self.located(), self.as_dict()))
        return min(([k for k in keys if k.split(".")[0] not in NOT_PART_OF_THE_RUN] for keys in found), key=len)


class Flags(TypedDict, total=False):
    """What stands above a job file: what the command line gives, None where it gives nothing."""

    model: str | None
    task: str | None
    method: str | None
    output: str | None
    dtype: str | None
    seed: int | None
    config: Fields
    trainer: Fields
    data: Fields


Part = TypeVar("Part", Job, Data)


def read(path: Path | None, flags: Flags) -> Job:
    """The job in a YAML file (if any) with flags laid over it. Data files are looked for beside the YAML file first.

    The record that a run keeps of its job means that run's folder as its output, wherever the folder has gone since.
    """
    raw: Fields = {}
    if path is not None:
        if not path.is_file():
            if path.is_dir():
                raise UserError(f"{path} is a folder, expected a job file in YAML. Is it {path / NAME}?")
            raise UserError(
                f"There is no job file {str(path)!r}. Name a YAML file, or give flags (--model, --train ...)."
            )
        text = text_of(path, MOST)
        if not text.strip("\0 \n\r\t"):
            raise UserError(
                f"The job file {path} is empty{', as a crash while it was written leaves it' if _is_record(path) else ''}. "
                "Give the job by flags or by another file."
            )
        found = parse(text, str(path))
        if not isinstance(found, dict):
            raise UserError(f"{path} holds {type(found).__name__}, expected keys such as `model:`, `data:`, `method:`.")
        raw = dict(found)
        for name in ("data", "config", "trainer"):
            if not isinstance(raw.get(name) or {}, dict):
                raise UserError(f"{path}: `{name}` is {raw[name]!r:.100}, expected keys below it.")
        if _is_record(path):
            raw["output"] = str(path.absolute().parent)
    data = dict(raw.pop("data", None) or {})
    for name in ("train", "eval"):
        beside = path.parent / data[name] if path is not None and isinstance(data.get(name), str) else None
        if beside is not None and beside.exists():
            data[name] = str(beside)
    data |= {k: v for k, v in flags.pop("data", {}).items() if v is not None}
    raw["config"] = dict(raw.get("config") or {}) | flags.pop("config", {})
    raw["trainer"] = dict(raw.get("trainer") or {}) | flags.pop("trainer", {})
    raw |= {k: v for k, v in flags.items() if v is not None}
    layers(raw["config"].get(LAYERS))
    job = made(raw | {"data": data})
    if not job.model:
        raise UserError("No model. Give --model (or `model:` in the job file): a hub id, a folder or a GGUF file.")
    return job


def located(name: object) -> object:
    """The full path where `name` is that of a file or folder that exists; everything else as it is."""
    if not isinstance(name, str) or not name:
        return name
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def _is_record(path: Path) -> bool:
    return path.name == NAME and (path.absolute().parent / MARKER).is_file()


def assignments(pairs: list[str], flag: str) -> Fields:
    """`["r=8", "target_modules=[q_proj, v_proj]"]` as a dict; the values are YAML."""
    found: Fields = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name.strip():
            raise UserError(
                f"{flag} {pair!r}: expected NAME=VALUE, such as {flag} {'r=8' if flag == '--set' else 'max_steps=100'}."
            )
        found[name.strip()] = parse(value, f"{flag} {pair}")
    return found


def parse(text: str, where: str) -> object:
    if len(text) > MOST:
        raise UserError(f"{where[:200]} has {len(text)} characters, at most {MOST} are read.")
    try:
        return yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError) as error:
        said = str(error).replace('"<unicode string>", ', "")
        raise UserError(f"{where} is not YAML that can be read: {said}") from None


def layers(given: object) -> list[int] | int | None:
    """Layer numbers as configs take them: `15-29` and `0-3,8` as a list, likewise a list of numbers and such ranges.

    Both ends of a range belong to it. A single number and None stay as they are.
    """
    if given is None or (isinstance(given, int) and not isinstance(given, bool)):
        return given
    found: list[int] = []
    parts = given.split(",") if isinstance(given, str) else given if isinstance(given, (list, tuple)) else [given]
    for part in parts:
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(part), re.ASCII)
        if ends is None:
            raise UserError(
                f"config.{LAYERS}: {str(part)!r} is neither a layer's number nor a range of them. "
                "Expected such as 7, 15-29 or 0-3,8."
            )
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if last < first:
            raise UserError(f"config.{LAYERS}: the range {first}-{last} runs backwards; write {last}-{first}.")
        found += range(first, last + 1)
    return found


def check_fields(given: Fields, cls: type, what: str, *, reserved: dict[str, str] | None = None) -> None:
    """Every key of `given` is a field of the dataclass `cls`, and not one that the job sets by another name."""
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    for name in given:
        if reserved and name in reserved:
            raise UserError(f"{what}.{name} is set by the job: use {reserved[name]} instead.")
        if name not in known:
            hint = checks.synonym(str(name), known=f"{what}.{name}") or nearest(name, known)
            raise UserError(f"{what}.{name}: {cls.__name__} has no such field. {hint}".rstrip())


def made(given: Fields) -> Job:
    """A job from its fields, all of them checked."""
    data = given.get("data")
    if not isinstance(data, dict):
        raise UserError(f"`data` is {data!r:.100}, expected keys such as train, text and target below it.")
    found = _make(Job, given | {"data": _make(Data, data, "data.")})
    check_job(found)
    return found


def columns_of(data: Data) -> list[str]:
    """The columns that a prompt is made of, each once. `{text}` is the column that `data.text` names."""
    if not data.template:
        return [data.text]
    named = [column for _, column in checks.pieces(data.template) if column is not None]
    return list(dict.fromkeys(data.text if c == "text" else c for c in named))


def check_data(data: Data) -> None:
    """Every field of `data:` is of its type and in its range."""
    for name in ("train", "subset", "target", "template"):
        if getattr(data, name) is not None:
            checks.text(f"data.{name}", getattr(data, name), empty=name in ("train", "template"))
    checks.text("data.text", data.text)
    if isinstance(data.eval, (int, float)) and data.eval is not False:
        if isinstance(data.eval, bool) or not 0 < data.eval < 1:
            raise UserError(f"data.eval is {data.eval}: expected a file, a data set, or a fraction between 0 and 1.")
    elif data.eval is not None and data.eval is not False:
        checks.text("data.eval", data.eval, empty=True)
    checks.number("data.max_length (--max-length)", data.max_length, 2)
    if data.limit is not None:
        checks.number("data.limit", data.limit, 1)
    checks.flag("data.skip_bad_rows", data.skip_bad_rows)
    checks.check_choices(data.choices)
    if data.template and not any(column is not None for _, column in checks.pieces(data.template)):
        raise UserError("data.template names no column, so that every prompt would be the same. Put one in: {text}.")


def check_job(job: Job) -> None:
    """Every field of a job is of its type and in its range."""
    for name in ("model", "method", "output", "dtype"):
        checks.text(name, getattr(job, name), empty=name == "model")
    if job.task is not None:
        checks.text("task", job.task)
    checks.number("seed", job.seed, 0)
    checks.number("show", job.show, 0)
    checks.number("checkpoint_minutes", job.checkpoint_minutes, 0, whole=False, above=True)
    checks.flag("evaluate_before", job.evaluate_before)
    checks.flag("keep_checkpoints", job.keep_checkpoints)
    check_data(job.data)
    checks.check_trainer(job.trainer)


def _make(cls: type[Part], given: Fields, prefix: str = "") -> Part:
    known = [f.name for f in dataclasses.fields(cls)]
    for name in given:
        if name not in known:
            hint = checks.synonym(str(name)) or nearest(name, known)
            raise UserError(f"Unknown key `{prefix}{name}` in the job. {hint}".rstrip())
    return cls(**given)


def _with_layers(job: Fields) -> Fields:
    """A job's dict with its ranges of layers written out."""
    config = job.get("config") or {}
    return job | {"config": config | {LAYERS: layers(config[LAYERS])}} if LAYERS in config else job


def _differing(a: object, b: object, path: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in sorted({*a, *b}) for d in _differing(a.get(k), b.get(k), f"{path}.{k}" if path else k)]
    return [] if a == b else [path]
