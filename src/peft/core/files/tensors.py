"""Files of tensors: safetensors, or `.bin` that holds nothing but tensors. A file of many thin tensors is read and
written in one piece; of a large one, all that it says of its tensors is known before a value is read."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from typing import IO, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from ...contract.cheap_modules import uninterrupted
from ...contract.managed import split
from ...local_files import LONGEST, Kept, damaged, json_object
from .bin_files import read_bin

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
_READ = DTYPES | {
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_quoted: Callable[[str], str] = json.encoder.encode_basestring_ascii
Fetch = Callable[[Iterable[str]], dict[str, Tensor]]


class Weights(NamedTuple):
    """What a file holds. whole: what the tensors are views of; () where each has memory of its own. fetch: of a large
    file that is read in two steps, what reads values by key; the tensors are on the meta device then."""

    tensors: dict[str, Tensor]
    header: dict[str, str]
    whole: tuple[Tensor, ...] = ()
    fetch: Fetch | None = None


class Entry(NamedTuple):
    """One tensor in a file: where its bytes lie, from the first tensor's."""

    dtype: torch.dtype
    shape: list[int]
    first: int
    last: int


def read_weights(path: str, two_steps: bool = False) -> Weights:
    """The tensors and the header of a weights file; `.bin` only through `weights_only`.

    two_steps: of a file larger than `SMALL`, the values only when they are asked for.
    """
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        with uninterrupted():
            try:
                if not path.endswith(".safetensors"):
                    specs, header, fetch = read_bin(f, path, size)
                    return (
                        Weights(specs, header, (), fetch)
                        if two_steps and size > SMALL
                        else Weights(fetch(specs), header)
                    )
                return _read(f, size, two_steps)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as e:
                raise damaged(path, size, e) from e


def _read(f: IO[bytes], size: int, two_steps: bool) -> Weights:
    """8 bytes for the header's length, the header, and the tensors one after another."""
    length = int.from_bytes(f.read(8), "little")
    if not 0 < length <= size - 8:
        raise ValueError("its header does not fit into it")
    if length > LONGEST:
        raise ValueError(f"its header has {length} bytes, at most {LONGEST} are read")
    entries, said = _laid_out(f.read(length), size - 8 - length)
    if size > SMALL or sys.byteorder == "big":
        kept = Kept(f)

        def fetch(keys: Iterable[str]) -> dict[str, Tensor]:
            with kept.open() as again:
                return {k: _values(again, 8 + length, entries[k]) for k in keys}

        if not two_steps:
            return Weights(fetch(entries), said)
        meta = {k: torch.empty(e.shape, dtype=e.dtype, device="meta") for k, e in entries.items()}
        return Weights(meta, said, (), fetch)
    memory = torch.empty(size - 8 - length, dtype=torch.uint8)
    if f.readinto(memory.numpy().data) != len(memory):  # type: ignore[attr-defined]
        raise ValueError("it ends before its tensors do")
    whole, tensors = [], dict[str, Tensor]()
    for dtype, alike in itertools.groupby(entries.items(), key=lambda entry: entry[1].dtype):
        group = list(alike)
        piece = memory[group[0][1].first : group[-1][1].last]
        if piece.storage_offset() % dtype.itemsize:
            piece = piece.clone()
        whole.append(piece.view(dtype))
        parts = whole[-1].split([(e.last - e.first) // dtype.itemsize for _, e in group])
        tensors |= {k: t.view(e.shape) for (k, e), t in zip(group, parts, strict=True)}
    return Weights(tensors, said, tuple(whole))


def _values(f: IO[bytes], start: int, entry: Entry) -> Tensor:
    memory = torch.empty(entry.last - entry.first, dtype=torch.uint8)
    f.seek(start + entry.first)
    if f.readinto(memory.numpy().data) != len(memory):  # type: ignore[attr-defined]
        raise ValueError("it ends before its tensors do")
    if sys.byteorder == "big" and entry.dtype.itemsize > 1:
        size = entry.dtype.itemsize // (2 if entry.dtype.is_complex else 1)
        memory = memory.view(-1, size).flip(1).flatten()
    return memory.view(entry.dtype).view(entry.shape)


def _laid_out(header: bytes, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors that a header names in the `size` bytes that follow it, in their order there and without gaps; and
    what else it says. ValueError where it is irregular."""
    found = json_object(header.decode())
    said = found.pop("__metadata__", None)
    if said is not None and not (isinstance(said, dict) and all(isinstance(v, str) for v in said.values())):
        raise ValueError("its __metadata__ is no table of texts")
    at, entries = 0, dict[str, Entry]()
    for key, entry in sorted(found.items(), key=lambda entry: entry[1]["data_offsets"]):
        if len(entry) != 3 or entry["dtype"] not in _READ:
            raise ValueError(f"it says of {key[:200]!r} what is not read: {str(entry)[:200]}")
        dtype, shape, (first, last) = _READ[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (first, last, *shape)):
            raise ValueError(f"{key[:200]!r} has sizes or offsets that are no whole numbers")
        if first != at or last != first + math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{key[:200]!r} lies at {first} to {last}, not where its shape {str(shape)[:200]} wants it"
            )
        entries[key] = Entry(dtype, shape, first, last)
        at = last
    if at != size:
        raise ValueError(f"its tensors have {at} bytes, the file holds {size} of them")
    return entries, said or {}


def finite(t: Tensor) -> bool:
    """Whether no entry is NaN or inf. A finite sum says so in one pass; another may be an overflow of the sum itself."""
    t = t.float() if t.dtype.itemsize == 1 else t  # torch cannot add up the 8-bit formats
    return math.isfinite(abs(t.detach().sum().item())) or bool(torch.isfinite(t).all())


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
        for dtype, group in groups.items():
            if dtype not in _READ.values():
                key, how = next(iter(group)), "save with safe_serialization=False"
                raise ValueError(f"{key[:200]} holds {dtype}, which safetensors files have no numbers for: {how}.")
        others = {k: alone(t) for group in groups.values() for k, t in group.items()}
        with open(path, "wb") as f:  # the library itself would put another file in the place of this one, which is held
            f.write(save(others, metadata=header))
        return
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
