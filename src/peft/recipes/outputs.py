"""Folders that commands write: a marker in them lists what was written, and nothing else is replaced or removed.

A file is a command's own where the marker lists its path with the digest of what it holds, and no part of the path below
the folder is a link. So what somebody else put there, or changed, or linked to, is never written over or deleted.

Everything is written aside, in a folder of this output's own below it, listed, and only then moved to its place: whoever
is killed in between leaves the old file or the new one, and what lies aside is swept by the next command.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import UserError
from ..version import __version__
from .writing import digest, settle, writing

if TYPE_CHECKING:
    from ..config import Fields

MARKER = ".peft-output.json"
ABOUT = "Lists what peft wrote into this folder: the only files that its commands will replace or remove here."
KNOWN = 2  # digests kept of a file: the one it has, and the one that is about to take its place


class Output:
    """The folder that `command` writes. A context: while it is open, no other command of this kind writes there.

    writes: False in the processes of a run that leave the writing to the first one.
    foreign: how to tell a folder of an earlier version, which has no marker, from somebody else's.
    """

    def __init__(
        self, folder: Path, command: str, *, writes: bool = True, foreign: Callable[[Path], bool] = lambda _: False
    ) -> None:
        self.folder, self.command, self.writes = folder.absolute(), command, writes
        self.files: dict[str, list[str]] = {}  # path below the folder -> digests, the newest last
        self.folders: list[str] = []
        self.notes: Fields = {}  # what the command wants to know the next time
        self.adopted = False  # begun by a version that left no marker
        self.marked = False  # whether there is a marker that can be read
        self.staging = self.folder / f".staging-{secrets.token_hex(4)}"
        self.foreign = foreign
        self.lock: int | None = None
        self.made: list[Path] = []  # folders that were not there before

    # -- opening ------------------------------------------------------------------------------------------------------
    def __enter__(self) -> Output:
        if self.folder.is_symlink():
            raise UserError(
                f"{self.folder} is a link to {os.path.realpath(self.folder)}. Nothing is written through links: name the "
                "folder itself as output."
            )
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file, and the output must be a folder. Give another one.")
        if self.writes:
            self.made = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        try:
            self.read()
            if self.writes:
                self._sweep()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self.writes:
            with contextlib.suppress(OSError):
                self._sweep()
                for folder in self.made:  # those that got nothing to hold
                    folder.rmdir()
        self._release()

    def _release(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def _take_lock(self) -> None:
        """The system gives the lock back by itself when a process ends, however it ends."""
        try:
            import fcntl

            handle = os.open(self.folder, os.O_RDONLY)
        except (ImportError, OSError):  # systems without such locks
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"Another command is writing into {self.folder}. Wait for its end, or give another output."
            ) from None
        except OSError:  # file systems without them
            os.close(handle)
            return
        self.lock = handle

    def read(self) -> None:
        """Take in what the marker says; raises `UserError` where the folder is somebody else's."""
        if not self.folder.exists():
            return
        others = [p.name for p in self.folder.iterdir() if p.name != MARKER]
        marker = self.folder / MARKER
        found: object = None
        if marker.is_file() and not marker.is_symlink():
            with contextlib.suppress(ValueError):
                found = json.loads(marker.read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found.get("files"), dict) and found.get("made_by"):
            if found["made_by"] != self.command:
                raise UserError(f"{self.folder} was written by `{found['made_by']}`. Give another output.")
            self.files = {str(k): [str(d) for d in v] for k, v in found["files"].items() if _below(k)}
            self.folders = [str(f) for f in found.get("folders") or [] if _below(f)]
            self.notes = dict(found.get("notes") or {})
            self.adopted = bool(self.notes.get("adopted"))
            staging = str(found.get("staging", ""))
            if staging.startswith(".staging-") and len(Path(staging).parts) == 1:
                self.staging = self.folder / staging
            self.marked = True
        elif others and self.foreign(self.folder):
            self.adopted = True
        elif others or marker.is_symlink():
            raise UserError(
                f"{self.folder} is not empty, and `{self.command}` did not write what is in it. Nothing there is touched: "
                "give another output, a folder that is new or empty."
            )

    def _sweep(self) -> None:
        """Remove what a command that was killed left aside."""
        if self.marked and self.staging.is_dir() and not self.staging.is_symlink():
            shutil.rmtree(self.staging, ignore_errors=True)

    # -- what is whose ------------------------------------------------------------------------------------------------
    def path(self, name: str) -> Path:
        return self.folder / name

    def listed(self, name: str) -> list[str]:
        """The files that were written as `name` or below it; the name "" is the folder itself."""
        return [f for f in self.files if not name or f == name or f.startswith(f"{name}/")]

    def is_own(self, name: str) -> bool:
        """Whether the file is there, and as it was written."""
        path = self.path(name)
        if self._linked(name) or not path.is_file() or name not in self.files:
            return False
        return digest(path) in self.files[name]

    def is_whole(self, name: str) -> bool:
        """Whether all that was last written as `name` and below it is there, byte for byte."""
        found = self.listed(name)
        return bool(found) and all(
            not self._linked(f) and self.path(f).is_file() and digest(self.path(f)) == self.files[f][-1] for f in found
        )

    def in_the_way(self, *names: str) -> list[str]:
        """What is at the place of these files and folders without having been written by the command as it is now."""
        found = []
        for name in names:
            if not os.path.lexists(self.path(name)):
                continue
            if self._linked(name) or (not self.listed(name) and not self.path(name).is_dir()):
                found.append(name)
            else:
                found += [f for f in self.listed(name) if os.path.lexists(self.path(f)) and not self.is_own(f)]
        return found

    def _linked(self, name: str) -> bool:
        """Whether a part of the path below the folder is a link."""
        parts = Path(name).parts
        return any(self.folder.joinpath(*parts[: n + 1]).is_symlink() for n in range(len(parts)))

    # -- writing ------------------------------------------------------------------------------------------------------
    def begin(self, **notes: object) -> None:
        """Write the marker: from here on the folder is the command's own. `notes`: JSON values to keep in it."""
        self.notes |= notes
        if self.writes:
            self._write_marker()

    def _write_marker(self) -> None:
        content = {
            "about": ABOUT,
            "made_by": self.command,
            "version": __version__,
            "staging": self.staging.name,
            "files": self.files,
            "folders": self.folders,
            "notes": self.notes,
        }
        text = json.dumps(content, indent=1, default=str).encode()
        marker = self.folder / MARKER
        if not self.marked:  # what lies aside is known to the marker before there is such a thing
            marker.unlink(missing_ok=True)  # cut short by a crash, and alone
            try:
                with marker.open("xb") as file:
                    file.write(text)
            except OSError:
                marker.unlink(missing_ok=True)
                raise
            settle(marker)
            self.marked = True
        else:
            with self._apart() as folder:
                part = folder / MARKER
                part.write_bytes(text)
                settle(part)
                os.replace(part, marker)
        settle(self.folder)

    @contextlib.contextmanager
    def _apart(self) -> Iterator[Path]:
        """A folder for what is being written; gone afterwards."""
        self.staging.mkdir(exist_ok=True)
        folder = self.staging / secrets.token_hex(4)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.staging.rmdir()

    @contextlib.contextmanager
    def written(self, name: str) -> Iterator[Path]:
        """A path to write a file or a folder to; at the end it takes the place of `name`, or is removed on an error.

        Where others write, nothing does: the path is of no use but to be passed on.
        """
        if not self.writes:
            yield self.staging / Path(name).name
            return
        with self._apart() as folder:
            part = folder / Path(name).name
            with writing(self.path(name)):
                yield part
                if part.exists():
                    self.publish(part, name)

    def write(self, name: str, content: str) -> None:
        """A text file, whole or not at all."""
        with self.written(name) as part:
            if self.writes:
                part.write_text(content, encoding="utf-8")

    def publish(self, part: Path, name: str) -> None:
        """List the file or folder `part` as `name`, then move it there."""
        below = f"{name}/" if name else ""
        new = {f"{below}{p.relative_to(part).as_posix()}": p for p in part.rglob("*") if p.is_file()}
        new = new if part.is_dir() else {name: part}
        self._refuse([n for n in new if os.path.lexists(self.path(n)) and not self.is_own(n)])
        folders = [p.as_posix() for n in new for p in Path(n).parents if p != Path()]
        self._refuse([f for f in folders if self._linked(f) or (self.path(f).exists() and not self.path(f).is_dir())])
        old = [n for n in self.listed(name) if n not in new]
        for n, file in new.items():
            settle(file)
            self.files[n] = [*self.files.get(n, []), digest(file)][-KNOWN:]
        for f in sorted(set(folders)):
            if f not in self.folders and not self.path(f).exists():
                self.folders.append(f)
        self._write_marker()
        if part.is_dir() and not self.path(name).exists():
            self.path(name).parent.mkdir(parents=True, exist_ok=True)
            os.rename(part, self.path(name))
        else:
            for n, file in new.items():
                self.path(n).parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, self.path(n))
            self.remove(*old)
        settle(self.path(name).parent)

    def keep_folder(self, name: str) -> None:
        """Make a folder, for others to write into, too; it is removed with the last file in it."""
        if self.writes and not os.path.lexists(self.path(name)):
            self.folders.append(name)
            self._write_marker()
            self.path(name).mkdir()

    def _refuse(self, names: Iterable[str]) -> None:
        found = sorted(set(names))
        if found:
            raise UserError(
                f"In {self.folder}, {', '.join(found[:5])}{' ...' if len(found) > 5 else ''} stands where `{self.command}` "
                "writes, and is not what it wrote. Move it elsewhere and run the same command again, or give another "
                "output."
            )

    def refuse_what_is_in_the_way(self, *names: str) -> None:
        """Raise `UserError` naming files at the places of `names` that must not be touched."""
        self._refuse(self.in_the_way(*names))

    def remove(self, *names: str) -> None:
        """Remove what was written as these names and below them; what others put there, or changed, stays."""
        gone = [f for name in names for f in self.listed(name)]
        below = [f for f in self.folders if any(not n or f == n or f.startswith(f"{n}/") for n in names)]
        if not (gone or below) or not self.writes:
            return
        for f in gone:
            if self.is_own(f):
                self.path(f).unlink()
        for f in sorted(below, key=len, reverse=True):
            if not self._linked(f):
                with contextlib.suppress(OSError):  # somebody else's files are in it
                    self.path(f).rmdir()
        self.files = {f: known for f, known in self.files.items() if f not in gone}
        self.folders = [f for f in self.folders if f not in below or self.path(f).is_dir()]
        self._write_marker()

    def discard(self) -> None:
        """Remove all that was written here, the marker, and the folder if nothing else is in it."""
        self._sweep()
        self.remove("")
        if self.marked:
            (self.folder / MARKER).unlink(missing_ok=True)
            self.marked = False
        self.folder.rmdir()


def _below(name: object) -> bool:
    """Whether a path from a marker stays in its folder."""
    return isinstance(name, str) and bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts
