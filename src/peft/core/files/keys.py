"""An adapter's tensors under their keys in the file, and back: every key lands, every tensor is filled."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from operator import attrgetter

import torch
from torch import Tensor, nn

from ...config import PeftConfig
from ...contract import managed
from ...contract.method import Method
from ...contract.tree import without_wrappers
from ...errors import LONGEST_NAME, CheckpointError, near
from ...registry import method as method_of
from ..acting.roster import Adapter, Roster
from . import sharded
from .tensors import alone

ROOT = "base_model.model."
FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)  # dtypes of a file that a float parameter takes; integers and others are no weights


@dataclasses.dataclass
class FileTensor:
    """Where one tensor of the file lives in memory."""

    method: Method
    attr: str

    @property
    def tensor(self) -> Tensor:
        return _at(self.method, self.attr)

    @property
    def disk_shape(self) -> tuple[int, ...]:
        shape = self.method.table.disk_shape(self.method, self.attr)
        return tuple((self.tensor if shape is None else self.tensor.reshape(shape)).shape)

    def assign(self, value: Tensor, adopt: bool = False) -> None:
        """adopt: nobody holds the storage yet, and the value is ours to keep: no copy."""
        old = self.tensor
        if value.shape != old.shape:
            value = value.reshape(old.shape)
        device = self.method.device if old.is_meta else old.device
        if value.dtype != old.dtype or value.device != device:
            value = value.to(device, old.dtype)
        value = managed.like(value, old)
        if adopt and type(old) is nn.Parameter and not old.is_meta:
            old.data = value
        elif isinstance(old, nn.Parameter):
            if old.device.type == "meta":
                owner, _, leaf = self.attr.rpartition(".")
                holder = attrgetter(owner)(self.method) if owner else self.method
                holder._parameters[leaf] = nn.Parameter(alone(value), requires_grad=old.requires_grad)
            else:
                old.data.copy_(value)  # in place: optimisers, compiled graphs and flat parameters hold the storage
        else:
            old.copy_(value)


def root_of(config: PeftConfig) -> str:
    """What stands before a module's path: methods whose site is the whole model have no tuner wrapper on disk."""
    return "base_model." if config.is_prompt_learning else ROOT


def file_tensors(adapter: Adapter) -> Iterator[tuple[str, FileTensor]]:
    """(key in the file, place in memory) of every tensor of an adapter."""
    return ((key, FileTensor(method, attr)) for key, method, attr, _ in _tensors(adapter))


def _tensors(adapter: Adapter) -> Iterator[tuple[str, Method, str, Tensor]]:
    root = root_of(adapter.config)
    seen: set[str] = set()
    for disk_path, method in adapter.methods:
        for attr, key in method.table.keys.items():
            if (held := _held(method, attr)) is not None:
                yield (f"{root}{disk_path}.{key}" if disk_path else key), method, attr, held
        for attr, key in method.table.shared_keys.items():
            if key not in seen and (held := _held(method, attr)) is not None:
                seen.add(key)
                yield f"base_model.{key}", method, attr, held


def _at(method: Method, attr: str) -> Tensor:
    """What a dotted name means below a method: nearly always a parameter of its own, or an attribute that says None."""
    own = method._parameters.get(attr)
    if own is not None:
        return own
    held: Tensor = method.__dict__[attr] if attr in method.__dict__ else attrgetter(attr)(method)
    return held


def _held(method: Method, attr: str) -> Tensor | None:
    try:
        return _at(method, attr)
    except AttributeError:
        return None


def state_dict_of(
    roster: Roster, name: str, gathered: sharded.Gathered | None = None, whole: bool = False, meta: bool = False
) -> dict[str, Tensor]:
    """The adapter's tensors under their keys in the file. gathered: values of tensors that are not whole here. whole:
    put those together that are split over processes (collective); else their pieces are given. meta: take tensors of
    the meta device as they are, which have shapes and no values."""
    roster.known([name])
    adapter = roster.adapters[name]
    if gathered is None and any(managed.flat(m) for _, m in adapter.methods[:1]):
        sharded.check_summoned(adapter.parameters(), name)
    out: dict[str, Tensor] = {}
    for key, method, attr, value in _tensors(adapter):
        if attr in method.table.unwritten:
            continue
        if gathered is not None and (found := gathered(method, attr)) is not None:
            value = found
        why = sharded.unreadable(value)
        if why and not (meta and value.is_meta):
            raise CheckpointError(
                f"Adapter {name!r}: {key} holds no values ({why}). Load weights first; with ZeRO-3 or FSDP save through "
                "the trainer, which gathers them, or pass state_dict=accelerator.get_state_dict(model)."
            )
        if managed.partitioned(value) or (whole and managed.split(value)):
            value = managed.whole(value)
        value = method.stored(attr, value.detach())
        shape = method.table.disk_shape(method, attr)
        out[key] = value if shape is None else value.reshape(shape)
    return _translate(roster, out, adapter, "to_disk")


def _translate(roster: Roster, state: dict[str, Tensor], adapter: Adapter, how: str) -> dict[str, Tensor]:
    """Let composites (experts) turn their parts' tensors into upstream's layout, or back."""
    for disk_path, composite in roster.composites.items():
        methods = {s.removeprefix(f"{disk_path}."): m for s, m in adapter.methods if s.startswith(f"{disk_path}.")}
        prefix = f"{root_of(adapter.config)}{disk_path}."
        mine = {k.removeprefix(prefix): state.pop(k) for k in list(state) if k.startswith(prefix)}
        state.update({prefix + k: v for k, v in getattr(composite, how)(mine, methods).items()})
    return state


def modules_in_file(tensors: Iterable[str], config: PeftConfig) -> set[str] | None:
    """The paths of the modules that a file's tensors belong to; None where it holds raw parameters' adapters, too."""
    if getattr(config, "target_parameters", None):
        return None
    bodies = (sharded.unwrapped_name(k).removeprefix(ROOT) for k in tensors)
    mark = f".{method_of(config.peft_type).prefix}"
    return {b.rpartition(mark)[0] for b in bodies if mark in b}


def fit(
    roster: Roster, adapter: Adapter, tensors: dict[str, Tensor]
) -> tuple[dict[str, tuple[FileTensor, Tensor]], list[str], list[str]]:
    """Match a file's tensors to an adapter's tensors: (pairs, keys missing in the file, keys nobody takes)."""
    root = root_of(adapter.config)
    inside = any(disk_path.startswith("module.") for disk_path, _ in adapter.methods)
    tensors = {_with_root(k, root, inside): v for k, v in tensors.items()}
    tensors = _translate(roster, tensors, adapter, "from_disk")
    for disk_path, method in adapter.methods:
        prefix = f"{root}{disk_path}." if disk_path else ""
        if not method.table.flexible and type(method).resize is Method.resize:
            continue
        keys = {a: prefix + k for a, k in method.table.keys.items()}
        keys |= {a: f"base_model.{k}" for a, k in method.table.shared_keys.items()}
        method.resize({a: tensors[k] for a, k in keys.items() if k in tensors})
    wanted = dict(file_tensors(adapter))
    pairs = {k: (s, tensors[k]) for k, s in wanted.items() if k in tensors}
    others = {k for k, s in wanted.items() if s.attr in s.method.table.unwritten}
    missing = [k for k in wanted if k not in tensors and k not in others]
    again = tuple(
        f"{root}{disk_path}.{start}" for disk_path, method in adapter.methods for start in method.table.repeats
    )
    return pairs, missing, [k for k in tensors if k not in wanted and not k.startswith(again)]


def _with_root(key: str, root: str, inside: bool) -> str:
    """Files of injected models and of diffusers lack the prefix of the PeftModel wrapper, and the steps of torch's wrappers
    are in some. inside: the base has a part called `module`, so that this step is none of them."""
    key = without_wrappers(key)
    if not inside:
        key = key.removeprefix("module.")
        if key.startswith(ROOT + "module."):
            key = ROOT + key.removeprefix(ROOT + "module.")
    if key.startswith("base_model.") or "." not in key:
        return key
    return root + key


def check_fit(pairs: dict[str, tuple[FileTensor, Tensor]], missing: list[str], extra: list[str], source: str) -> None:
    """Raise unless every key lands and every tensor is filled with values that it can hold."""
    check_keys(pairs, missing, extra, source)
    check_values(pairs, source)


def check_keys(pairs: dict[str, tuple[FileTensor, Tensor]], missing: list[str], extra: list[str], source: str) -> None:
    """Raise unless every key lands and every tensor is filled."""
    if missing or extra:
        file_keys = [*pairs, *extra]
        hint = "".join(near(m, extra, 1) for m in missing[:1]) or "".join(near(e, missing, 1) for e in extra[:1])
        raise CheckpointError(
            f"{source or 'The state dict'} does not fit this model.{hint}"
            f"\n  missing adapter keys: {len(missing)} tensors of the adapter are not in the file: {few(missing)}"
            f"\n  unexpected keys: {len(extra)} keys of the file have no place in the model: {few(extra)}"
            f"\n  {len(pairs)} of {len(file_keys)} keys fit. Check the base model and the adapter's target_modules."
        )


def check_values(pairs: dict[str, tuple[FileTensor, Tensor]], source: str, ignore_sizes: bool = False) -> list[str]:
    """Raise unless each tensor can hold the values that a file has for it, without loss beyond rounding.

    Returns the keys of other sizes, which are an error unless `ignore_sizes`.
    """
    source, wrong = source or "The state dict", mismatched(pairs)
    if wrong and not ignore_sizes:
        shapes = [f"{k}: file {tuple(pairs[k][1].shape)}, model {pairs[k][0].disk_shape}" for k in wrong]
        raise CheckpointError(f"{source}: size mismatch, is this the right base model? {few(shapes)}")
    for key, (held, value) in pairs.items():
        dtype = held.tensor.dtype
        if value.dtype is not dtype and key not in wrong and (why := _lossy(value, dtype)):
            raise CheckpointError(f"{source}: {key} {why}.")
    return wrong


def mismatched(pairs: dict[str, tuple[FileTensor, Tensor]]) -> list[str]:
    """The keys of tensors that have neither the size of the model's in the file nor in memory."""
    return [k for k, (s, t) in pairs.items() if t.shape != s.tensor.shape and tuple(t.shape) != s.disk_shape]


def _lossy(value: Tensor, dtype: torch.dtype) -> str:
    """Why values of a file cannot stand in a tensor of another dtype; "" where they can."""
    given = value.dtype
    if dtype.is_floating_point or dtype.is_complex:
        if given not in FLOATS and not (given.is_complex and dtype.is_complex):
            return f"holds {given}, where the adapter has floats"
        if dtype.is_complex or torch.finfo(given).max <= torch.finfo(dtype).max or value.is_meta or not value.numel():
            return ""
        most = float(value.detach().abs().max())
        return f"holds {most:.3g}, which {dtype} cannot" if most > torch.finfo(dtype).max and most != math.inf else ""
    if dtype is torch.bool or given is torch.bool or given.is_complex:
        return f"holds {given}, where the adapter has {dtype}"
    if value.is_meta or not value.numel():
        return ""
    least, most = float(value.min()), float(value.max())
    known = torch.iinfo(dtype)
    if not known.min <= least <= most <= known.max or (given.is_floating_point and not value.eq(value.round()).all()):
        return f"holds values from {least:.6g} to {most:.6g}, which are no {dtype}"
    return ""


def few(items: list[str], n: int = 6) -> str:
    """The first of some names, and how many there are."""
    return (
        ", ".join(i[:LONGEST_NAME] for i in items[:n]) + (f", … ({len(items)} in all)" if len(items) > n else "")
        if items
        else "none"
    )


def assign(pairs: dict[str, tuple[FileTensor, Tensor]], adapter: Adapter, adopt: bool = False) -> None:
    managed.settle(m for _, m in adapter.methods)
    taken: set[int] = set()
    copies: tuple[list[Tensor], list[Tensor]] = [], []
    with torch.no_grad():
        for held, tensor in pairs.values():
            if not adopt and type(old := held.tensor) is nn.Parameter and _alike(old, tensor):
                copies[0].append(old.data)
                copies[1].append(tensor)
                continue
            at = tensor.data_ptr()
            held.assign(tensor, adopt and tensor.is_contiguous() and at not in taken)
            taken.add(at)
        if copies[0]:
            torch._foreach_copy_(*copies)


def _alike(old: Tensor, value: Tensor) -> bool:
    return old.shape == value.shape and old.device == value.device and not old.is_meta and type(value) is Tensor


def load_map(adapter: Adapter, held: Iterator[tuple[str, nn.Module]]) -> dict[str, str]:
    """Pattern of keys in a file -> the tensor that they lead to, for the module that holds it; {} for all others.

    held: (name below the module, method) of the methods there. The loader casts values to the dtype of the tensor
    they lead to, so keys of another dtype than the first floating tensor's (indices, masks) lead to one of their own.
    It writes the module's name and a dot before each pattern: the first alternative, which matches nothing, takes them.
    """
    names = {id(m): n for n, m in held}
    firsts = {id(m) for m in {type(m): m for _, m in reversed(adapter.methods)}.values()}
    if not firsts & set(names):
        return {}
    stored = [(k, s) for k, s in file_tensors(adapter) if id(s.method) in firsts]
    known = [(k.rpartition(".")[2], s) for k, s in stored if s.attr in s.method.state_dict()]
    if not known:
        return {}
    floats = [s for _, s in known if s.tensor.is_floating_point()]
    first = max(floats, key=lambda s: s.tensor.dtype.itemsize, default=known[0][1])
    others = {s.tensor.dtype: s for _, s in reversed(known) if s is not first and not s.tensor.is_floating_point()}
    keys = {d: "|".join(re.escape(k) for k, s in known if s.tensor.dtype == d) for d in others}
    out = {}
    for dtype, known_as in others.items():
        if id(known_as.method) in names:
            out[rf"(?!)|^(?:.*\.)?(?:{keys[dtype]})$"] = f"{names[id(known_as.method)]}.{known_as.attr}"
    if id(first.method) in names:
        apart = "".join(rf"(?!(?:.*\.)?(?:{keys[d]}|{re.escape(s.attr)})$)" for d, s in others.items())
        out[f"(?!)|^{apart}.*$"] = f"{names[id(first.method)]}.{first.attr}"
    return out
