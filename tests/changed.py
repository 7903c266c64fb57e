"""What a quick check runs: `python tests/changed.py` prints pytest's arguments for the files changed since main.

Always the house rules and the laws of LoRA on linear layers. In addition, of what differs from where this branch left
main, and of files that git does not know yet:

    src/peft/methods/ssf.py       the laws of its methods, and of those built on them, on linear layers; its tests
    src/peft/variants/dora.py     the laws of all examples whose config has its field; its tests. Companions likewise
    src/peft/layers/conv.py       the laws of LoRA on its kinds; its tests
    src/peft/core/files/keys.py   tests/core/files/test_keys.py, where there is such a file
    tests/test_api.py             itself

Tests marked slow are left out, and of the laws only these cells run, even where the laws themselves have changed.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RULES = "tests/test_architecture.py"
(LAWS,) = (p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("test_laws.py"))
METHOD, KIND = "LORA", "linear"  # what is always run


def changed(root: Path = ROOT) -> list[str]:
    """Paths, relative to the root, of files that differ from main's; none where there is no main to compare with."""

    def git(*args: str) -> list[str]:
        done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.split("\0") if "-z" in args else done.stdout.split()

    try:
        (base,) = git("merge-base", "HEAD", "main")
        found = git("diff", "-z", "--name-only", "--relative", base)
        found += git("ls-files", "-z", "--others", "--exclude-standard")
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted({f for f in found if f and (root / f).is_file()})


def cell(method: str, kind: str) -> str:
    """The laws' cells of a method (or of a config field in an example) on a kind, as an expression of `pytest -k`."""
    return f"({method} and ]-{kind}[)"


def cells_of(file: Path) -> list[str]:
    """The cells that say whether a method's or a layer kind's file is right; `file` is relative to src/peft."""
    from peft import registry

    module = f"peft.{'.'.join(file.with_suffix('').parts)}"

    def uses(cls: type) -> bool:
        return any(c.__module__ == module for c in cls.__mro__)

    found = [cell(f"[{name}[", KIND) for name, method in registry.methods().items() if uses(method)]
    brought = {**registry.companions(), **registry.wrappers()}
    found += [cell(field, KIND) for field, method in brought.items() if method.__module__ == module]
    found += [cell(f"[{METHOD}[", name) for name, kind in registry.kinds().items() if uses(type(kind))]
    return found


def tests_of(file: Path, root: Path = ROOT) -> list[str]:
    """The test module of a source file, which lies in tests/ as the source lies in src/peft."""
    test = Path("tests") / file.parent / f"test_{file.stem}.py"
    return [test.as_posix()] if (root / test).is_file() else []


def arguments(files: Iterable[str], root: Path = ROOT) -> list[str]:
    cells, tests = [cell(f"[{METHOD}[", KIND)], [RULES, LAWS]
    for name in files:
        path = Path(name)
        if path.suffix != ".py":
            continue
        if path.parts[:2] == ("src", "peft"):
            file = path.relative_to("src/peft")
            if file.parts[0] in ("methods", "companions", "variants", "layers"):
                cells += cells_of(file)
            tests += tests_of(file, root)
        elif path.parts[0] == "tests" and path.name.startswith("test_"):
            tests.append(name)
    chosen = " or ".join(dict.fromkeys(cells))
    return ["-q", "-m", "not slow", "-k", f"{chosen} or not {Path(LAWS).name}", *dict.fromkeys(tests)]


if __name__ == "__main__":
    print(shlex.join(arguments(changed())))
