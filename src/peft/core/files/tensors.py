"""Files of tensors: safetensors, or `.bin` that holds nothing but tensors. A file of many thin tensors is read and
written in one piece."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...contract.cheap_modules import uninterrupted
from ...contract.managed import split
from ...errors import CheckpointError

SMALL = 2**26  # bytes up to which a file passes through memory as a whole

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_STORED = {d: (n, torch.int16 if n == "BF16" else None) for n, d in DTYPES.items()}  # and as what numpy knows it
_PREAD: dict[str, str] = {"backend": "pread"} if "backend" in inspect.signature(load_file).parameters else {}
_quoted: Callable[[str], str] = json.encoder.encode_basestring_ascii


class Weights(NamedTuple):
    """What a file holds. whole: what the tensors are views of; () where each has memory of its own."""

    tensors: dict[str, Tensor]
    header: dict[str, str]
    whole: tuple[Tensor, ...] = ()


def read_weights(path: str, device: str | None = None) -> Weights:
    """The tensors and the header of a weights file; `.bin` only through `weights_only`."""
    if path.endswith(".safetensors"):
        try:
            with uninterrupted():
                found = _views(path) if device in (None, "cpu") else None
            if found is not None:
                return found
            with safetensors.safe_open(path, framework="pt") as f:
                header = f.metadata() or {}
            # read, not mapped: another process may write the file anew while this adapter is in use
            return Weights(load_file(path, device=device or "cpu", **_PREAD), header)
        except (safetensors.SafetensorError, OSError, ValueError) as e:
            size = os.path.getsize(path)
            raise CheckpointError(
                f"{path} ({size} bytes) is no readable safetensors file ({e}); it is damaged or cut short."
            ) from e
    try:
        return Weights(torch.load(path, map_location=device or "cpu", weights_only=True), {})
    except Exception as e:
        raise CheckpointError(f"{path} cannot be read as plain tensors ({type(e).__name__}: {e}).") from e


def _views(path: str) -> Weights | None:
    """A small file read at once: 8 bytes for the header's length, the header, and the tensors one after another.

    None for anything that is not just so: the library, which takes three times as long, reads it or says what is wrong.
    """
    with open(path, "rb") as f:
        size, length = os.fstat(f.fileno()).st_size, int.from_bytes(f.read(8), "little")
        if size > SMALL or not 0 < length <= size - 8 or sys.byteorder == "big":
            return None
        header, memory = f.read(length), torch.empty(size - 8 - length, dtype=torch.uint8)
        if f.readinto(memory.numpy().data) != len(memory):
            return None
    try:
        return _laid_out(json.loads(header.decode()), memory)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
        return None


def _laid_out(header: dict[str, Any], memory: Tensor) -> Weights:
    """The tensors that a header names in the memory that follows it, without gaps; an error where it is irregular."""
    said = header.pop("__metadata__", None)
    if not all(isinstance(v, str) for v in ({} if said is None else said).values()):
        raise ValueError
    entries = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"])
    at, whole, tensors = 0, [], dict[str, Tensor]()
    for name, alike in itertools.groupby(entries, key=lambda entry: entry[1]["dtype"]):
        dtype, group, start, counts = DTYPES[name], list(alike), at, list[int]()
        for _, entry in group:
            (first, last), count = entry["data_offsets"], math.prod(entry["shape"])
            if first != at or last != first + count * dtype.itemsize:
                raise ValueError
            counts.append(count)
            at = last
        whole.append(memory[start:at].view(dtype))
        parts = whole[-1].split(counts)
        tensors |= {k: t.view(entry["shape"]) for (k, entry), t in zip(group, parts, strict=True)}
    if at != len(memory):
        raise ValueError
    return Weights(tensors, said or {}, tuple(whole))


def finite(t: Tensor) -> bool:
    """Whether no entry is NaN or inf. A finite sum says so in one pass; another may be an overflow of the sum itself."""
    t = t.float() if t.dtype.itemsize == 1 else t  # torch cannot add up the 8-bit formats
    return math.isfinite(float(t.detach().sum())) or bool(torch.isfinite(t).all())


def not_finite(weights: Weights) -> list[str]:
    """The keys of tensors that hold NaN or inf."""
    if weights.whole and all(not t.is_floating_point() or finite(t) for t in weights.whole):
        return []
    return [k for k, t in weights.tensors.items() if t.is_floating_point() and not t.is_meta and not finite(t)]


def write_weights(tensors: dict[str, Tensor], path: str, header: dict[str, str]) -> None:
    """A safetensors file, the dtypes by falling size. The library's writer asks the system for each tensor, this one for
    each MB."""
    groups: dict[torch.dtype, dict[str, Tensor]] = {}
    for key, t in apart(tensors).items():
        groups.setdefault(t.dtype, {})[key] = t if t.is_cpu else t.cpu()
    if sys.byteorder == "big" or not groups.keys() <= _STORED.keys():
        return save_file({k: alone(t) for group in groups.values() for k, t in group.items()}, path, metadata=header)
    at, parts, table = 0, list[memoryview](), [f'"__metadata__":{json.dumps(header)}']
    shapes: dict[torch.Size, str] = {}  # as text
    for dtype in sorted(groups, key=lambda d: -d.itemsize):
        name, carrier = _STORED[dtype]
        for key, t in groups[dtype].items():
            first, at = at, at + t.nbytes
            shape = shapes.get(t.shape) or shapes.setdefault(t.shape, str(list(t.shape)))
            table.append(f'{_quoted(key)}:{{"dtype":"{name}","shape":{shape},"data_offsets":[{first},{at}]}}')
            parts.append((t if carrier is None else t.view(carrier)).numpy().data)
    said = f"{{{','.join(table)}}}".encode()
    said += b" " * (-len(said) % 8)
    with open(path, "wb", buffering=2**20) as f:
        f.write(len(said).to_bytes(8, "little") + said)
        f.writelines(parts)


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors' values, contiguous, no two at one address."""
    seen: set[int] = set()
    out = {}
    for k, t in tensors.items():
        t = t.detach() if t.requires_grad else t
        t = t if t.is_contiguous() else t.contiguous()
        at = t.data_ptr()
        out[k] = t.clone() if at in seen else t
        seen.add(at)
    return out


def alone(t: Tensor) -> Tensor:
    """The tensor, not as a part of a larger memory, which it would keep."""
    return t.clone() if not split(t) and t.untyped_storage().nbytes() > t.nbytes else t
