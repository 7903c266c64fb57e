"""Files in a folder: replaced together and whole, swept after crashes, and JSON read within bounds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from .errors import CheckpointError

if sys.platform != "win32":
    import fcntl

LONGEST = 2**25  # bytes of JSON that are read: 200,000 tensors' entries
_ASIDE = re.compile(r"\.adapter_[0-9a-f]{16}\.tmp")  # names of files that this library is writing, or was


# -- writing ----------------------------------------------------------------------------------------------------------------
def replace_files(folder: str, files: Mapping[str, Callable[[str], object]], instead_of: Sequence[str] = ()) -> None:
    """Write files aside, wait until the disk has them, and only then rename them, in their order.

    files: name -> what writes it to a path. instead_of: files that go once the first of the new ones has its name. Killed
    at any point this leaves each name with its old file or its new one; what lies aside then, the next call sweeps.
    """
    made: list[tuple[int, str]] = []
    changed: list[bool] = []
    try:
        for name, write in files.items():
            made.append(_aside(folder))
            write(made[-1][1])
            same = _same(made[-1][1], os.path.join(folder, name))
            if not same:
                os.fsync(made[-1][0])  # on a disk this takes 5 to 15 ms, most of what saving a small adapter takes
            changed.append(not same)
        with _alone(folder) as place:
            _sweep(folder)
            for n, (name, (_, path)) in enumerate(zip(files, made, strict=True)):
                if changed[n]:
                    os.replace(path, os.path.join(folder, name))
                old = [p for p in (os.path.join(folder, o) for o in instead_of) if os.path.lexists(p)] if n == 0 else []
                if old:
                    _sync(place)  # the new file's name must not be lost with the old file's
                for p in old:
                    os.unlink(p)
            _sync(place)
    finally:
        for fd, path in made:
            with contextlib.suppress(OSError):
                os.unlink(path)  # it has its name, unless something failed
            os.close(fd)


def _aside(folder: str) -> tuple[int, str]:
    """A new file that nobody sweeps while this process lives: (descriptor, path)."""
    while True:
        path = os.path.join(folder, f".adapter_{secrets.token_hex(8)}.tmp")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if _locked(fd) and os.path.exists(path):  # else a sweep came between
            return fd, path
        os.close(fd)


def _same(new: str, old: str) -> bool:
    """Whether a small file says what the one says that it would replace."""
    try:
        size = os.path.getsize(new)
        if size > 2**20 or size != os.path.getsize(old):
            return False
        with open(new, "rb") as a, open(old, "rb") as b:
            return a.read() == b.read()
    except OSError:
        return False


def _locked(fd: int) -> bool:
    """Take the lock of an open file, which its writer holds until it ends, however it ends."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _sweep(folder: str) -> None:
    """Remove what writers that are dead have left aside."""
    if sys.platform == "win32":
        return  # no locks that say who lives
    with os.scandir(folder) as found:
        old = [e.path for e in found if _ASIDE.fullmatch(e.name) and e.is_file(follow_symlinks=False)]
    for path in old:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(fd)


@contextlib.contextmanager
def _alone(folder: str) -> Iterator[int | None]:
    """Within, no other writer renames files of this folder. Gives its descriptor, where the system has such."""
    if sys.platform == "win32":
        yield None
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def _sync(folder: int | None) -> None:
    if folder is not None:
        with contextlib.suppress(OSError):  # file systems that cannot
            os.fsync(folder)


# -- JSON -------------------------------------------------------------------------------------------------------------------
def read_json(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """The JSON object that a file holds. what: what it is, for the error's text."""
    path = os.fspath(path)
    size = os.path.getsize(path)
    if size > LONGEST:
        raise ValueError(f"{path} has {size} bytes, {what} at most {LONGEST}.")
    with open(path, "rb") as f:
        data = f.read(LONGEST + 1)
    try:
        return json_object(data.decode("utf-8-sig"))
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON ({e}); {what} is damaged.") from e


class Kept:
    """The very file that was checked, for reading on, whatever gets its name meanwhile; given up with this object."""

    def __init__(self, f: IO[bytes]) -> None:
        self.descriptor = os.dup(f.fileno())

    def open(self) -> IO[bytes]:
        f = os.fdopen(os.dup(self.descriptor), "rb")
        f.seek(0)
        return f

    def __del__(self) -> None:
        os.close(self.descriptor)


def json_object(text: str) -> dict[str, Any]:
    """The object that a text holds as JSON. ValueError for anything else, and where a field is there twice."""
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it should hold a JSON object, found {type(found).__name__}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (name := repeated([k for k, _ in pairs])) is not None:
        raise ValueError(f"the field {name[:100]!r} is there twice")
    return dict(pairs)


def repeated(names: Sequence[str]) -> str | None:
    """The first of the names that stands there more than once; readers differ in which value they take."""
    if len(set(names)) == len(names):
        return None
    counts = Counter(names)
    return next(n for n in names if counts[n] > 1)


def damaged(path: str, size: int, why: object) -> CheckpointError:
    """The error for a weights file that cannot be read."""
    kind = "safetensors" if path.endswith(".safetensors") else "weights"
    return CheckpointError(f"{path} ({size} bytes) is no readable {kind} file ({why}); it is damaged or cut short.")
