"""`adapter_model.bin`: a zip archive that torch writes. Before torch reads it, its pickle is followed with nothing but
the names that a table of plain tensors needs, and what it says of each tensor is held against the archive's sizes.

This library writes a header into the archive, as one more record, which torch and upstream pass over.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...local_files import LONGEST, Kept, json_object

HEADER = "adapter_header.json"  # the record that holds the header


class Plain(NamedTuple):
    """A tensor as a pickle describes it: a part of a record of the archive."""

    record: str
    dtype: torch.dtype
    length: int  # elements of the record
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def write_bin(tensors: dict[str, Tensor], path: str, header: Mapping[str, str]) -> None:
    """A `.bin` with a header."""
    with open(path, "w+b") as f:
        torch.save(tensors, f)
        with zipfile.ZipFile(f, "a") as archive:
            archive.writestr(zipfile.ZipInfo(f"archive/{HEADER}"), json.dumps(dict(header), sort_keys=True))


def read_bin(
    f: IO[bytes], path: str, size: int
) -> tuple[dict[str, Tensor], dict[str, str], Callable[[Iterable[str]], dict[str, Tensor]]]:
    """(tensors on the meta device, header, what reads values by key)."""
    try:
        with zipfile.ZipFile(f) as archive:
            found, header = _described(archive, size)
    except Exception as e:  # whatever a broken archive or pickle runs into
        raise _not_plain(path, e) from e
    kept = Kept(f)

    def fetch(keys: Iterable[str]) -> dict[str, Tensor]:
        try:
            with kept.open() as again:
                values = dict(dict.items(torch.load(again, map_location="cpu", weights_only=True)))
            return {k: values[k].detach() for k in keys}
        except Exception as e:
            raise _not_plain(path, e) from e

    return {k: torch.empty(p.shape, dtype=p.dtype, device="meta") for k, p in found.items()}, header, fetch


def _not_plain(path: str, e: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read as plain tensors ({type(e).__name__}: {str(e)[:1000]}).")


def _described(archive: zipfile.ZipFile, size: int) -> tuple[dict[str, Plain], dict[str, str]]:
    """What an archive says of its tensors, each of which lies in it whole; and its header."""
    records = {i.filename: i for i in archive.infolist()}
    if len(records) < len(archive.infolist()) or any(i.compress_type for i in records.values()):
        raise ValueError("its records are compressed, or two have one name")
    if sum(i.file_size for i in records.values()) > size:
        raise ValueError("its records are larger than the file")
    roots = [n.removesuffix("/data.pkl") for n in records if n.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("it holds no data.pkl, or several")
    order = records.get(f"{roots[0]}/byteorder")
    if order is not None and archive.read(order) != b"little":
        raise ValueError("its numbers are not little-endian")
    found = _Follow(_bounded(archive, records[f"{roots[0]}/data.pkl"])).load()
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not a table of tensors")
    for key, plain in dict.items(found):
        if not isinstance(key, str) or not isinstance(plain, Plain):
            raise ValueError(f"what it holds under {str(key)[:200]!r} is no plain tensor")
        held = records.get(f"{roots[0]}/data/{plain.record}")
        if held is None or held.file_size != plain.length * plain.dtype.itemsize:
            raise ValueError(f"the record of {key[:200]!r} is missing, or of another size")
        _check_within(key, plain)
    said = records.get(f"{roots[0]}/{HEADER}")
    header = {} if said is None else json_object(_bounded(archive, said).read().decode())
    if not all(isinstance(v, str) for v in header.values()):
        raise ValueError("its header is no table of texts")
    return dict(dict.items(found)), header


def _bounded(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> io.BytesIO:
    if record.file_size > LONGEST:
        raise ValueError(f"{record.filename[:200]} has {record.file_size} bytes, at most {LONGEST} are read")
    return io.BytesIO(archive.read(record))


def _check_within(key: str, plain: Plain) -> None:
    """Raise unless a tensor lies within its record, each element in a place of its own."""
    numbers = (plain.length, plain.offset, *plain.shape, *plain.stride)
    if not all(type(n) is int and 0 <= n < 2**62 for n in numbers) or len(plain.shape) != len(plain.stride):
        raise ValueError(f"{key[:200]!r} has sizes that are no whole numbers")
    count = math.prod(plain.shape)
    reach = sum((n - 1) * s for n, s in zip(plain.shape, plain.stride)) + 1 if count else 0
    if plain.offset + max(reach, count) > plain.length:
        raise ValueError(f"{key[:200]!r} of shape {str(plain.shape)[:200]} reaches beyond its record")


# -- the pickle -------------------------------------------------------------------------------------------------------------
def _tensor(storage: Any, offset: int, shape: Any, stride: Any, *more: Any) -> Plain:
    """Stands for torch's functions that rebuild a tensor; a dtype among the last arguments is that of a raw record."""
    record, dtype, length = storage
    stated = next((m for m in more if isinstance(m, torch.dtype)), dtype)
    if stated is not dtype:
        length = length * dtype.itemsize // stated.itemsize
    return Plain(record, stated, length, offset, tuple(shape), tuple(stride))


def _parameter(data: Plain, *more: Any) -> Plain:
    return data


_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
        "Untyped": torch.uint8,
    }.items()
}
_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "UntypedStorage"): torch.uint8,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    **{("torch", n): d for n in ("float8_e4m3fn", "float8_e5m2") if isinstance(d := getattr(torch, n), torch.dtype)},
}


class _Follow(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Follows a pickle of a table of tensors: no name of it is imported, and no value is read. In Python, because the
    faster one makes room for as many remembered objects as the pickle claims to have."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no plain tensor needs") from None

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, record, _, length = pid
        if (
            kind != "storage"
            or not isinstance(dtype, torch.dtype)
            or type(record) is not str
            or type(length) is not int
        ):
            raise pickle.UnpicklingError("it refers to what is no memory of a tensor")
        return record, dtype, length
