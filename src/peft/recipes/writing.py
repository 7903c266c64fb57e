"""Files that are written whole or not at all, and how to tell whether one has changed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def settle(path: Path) -> None:
    """Ask the system to bring a file or a folder to the disk."""
    with contextlib.suppress(OSError):  # folders cannot be synced everywhere
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the system that do not name a file are about this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A new file beside `path` to write into, of a name that nobody has; renamed to `path` at the end, or removed."""
    made: list[Path] = []
    missing = [p for p in path.parents if not p.exists()]
    try:
        for folder in reversed(missing):
            folder.mkdir()
            made.append(folder)
        part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")
        try:
            with writing(path):
                part.touch(exist_ok=False)
                yield part
            settle(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except BaseException:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
