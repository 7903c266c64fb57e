"""The house rules, read from the sources: who may know what, and that nothing is stated twice.

Outside a method's file nothing asks which method it is dealing with, outside a kind's file nothing asks which kind. The
scan finds names in the code; `laws/renamed.py` runs laws with all of them replaced by random ones.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft import registry
from peft.contract.method import Method

ROOT = Path(registry.__file__).parent
FILES = {p.relative_to(ROOT).as_posix(): p for p in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(p.read_text(encoding="utf-8")) for name, p in FILES.items()}
METHOD_ROOMS = ("methods/", "companions/", "variants/")
DOORS = ("tuners/", "utils/")  # upstream's import paths

METHODS = registry.methods()
KINDS = registry.kinds()


def classes_in(folder: str, base: type) -> set[str]:
    found = set()
    for name in TREES:
        if name.startswith(f"{folder}/"):
            module = sys.modules.get(f"peft.{name[:-3].replace('/', '.')}")
            for value in vars(module).values() if module else ():
                if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__:
                    found.add(value.__name__)
    return found


METHOD_CLASSES = {c for room in METHOD_ROOMS for c in classes_in(room.rstrip("/"), Method)}


def code(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but docstrings and type annotations."""
    skip = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                skip.add(first.value)
    return (n for n in ast.walk(tree) if n not in skip)


def strings(tree: ast.AST) -> list[tuple[str, int]]:
    return [(n.value, n.lineno) for n in code(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def names(tree: ast.AST) -> list[tuple[str, int]]:
    return [
        (n.id if isinstance(n, ast.Name) else n.attr, n.lineno)
        for n in code(tree)
        if isinstance(n, (ast.Name, ast.Attribute))
    ]


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    found = []
    for n in code(tree):
        if isinstance(n, ast.ImportFrom):
            found += [(f"{n.module or ''}.{a.name}", n.lineno) for a in n.names]
        elif isinstance(n, ast.Import):
            found += [(a.name, n.lineno) for a in n.names]
    return found


def outside(*folders: str) -> dict[str, ast.Module]:
    return {n: t for n, t in TREES.items() if not n.startswith(folders)}


# -- methods ------------------------------------------------------------------------------------------------------------------
def test_no_code_outside_the_methods_asks_for_one():
    found = []
    for file, tree in outside(*METHOD_ROOMS, *DOORS).items():
        found += [f"{file}:{line} says {s!r}" for s, line in strings(tree) if s in METHODS]
        found += [f"{file}:{line} uses {s}" for s, line in names(tree) if s in METHODS or s in METHOD_CLASSES]
        for module, line in imports(tree):
            if re.search(r"(^|\.)methods\.\w", module) and not file.startswith("cli/"):
                found.append(f"{file}:{line} imports {module}")
    assert not found, "\n".join(found)


def test_no_code_outside_the_methods_knows_their_parameters():
    """Nor by the names of their tensors, which say as much."""
    own = {a.split(".")[-1] for m in METHODS.values() for a in m.keys if m.prefix and a.startswith(m.prefix)}
    own |= {m.prefix for m in METHODS.values() if m.prefix.endswith("_")}
    found = []
    for file, tree in outside(*METHOD_ROOMS, *DOORS).items():
        found += [f"{file}:{n} says {s!r}" for s, n in strings(tree) if s in own]
        found += [f"{file}:{n} uses .{s}" for s, n in names(tree) if s in own]
    assert len(own) > 20 and not found, "\n".join(found)


def test_a_methods_name_stands_in_its_own_file_only():
    owner = {name: m.__module__.replace("peft.", "").replace(".", "/") + ".py" for name, m in METHODS.items()}
    found = []
    for file, tree in TREES.items():
        if file.startswith(METHOD_ROOMS):
            found += [
                f"{file}:{n} says {s!r}, which is {owner[s]}"
                for s, n in strings(tree)
                if s in owner and owner[s] != file
            ]
    assert not found, "\n".join(found)


LAYERS = {
    "Linear",
    "Conv1D",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "MultiheadAttention",
    "Linear4bit",
    "Linear8bitLt",
}


def asked_types(tree: ast.AST) -> Iterator[tuple[int, str, set[str]]]:
    """(line, what is asked, the types it is asked for) of every isinstance."""
    for n in code(tree):
        if isinstance(n, ast.Call) and getattr(n.func, "id", "") in ("isinstance", "issubclass"):
            yield n.lineno, ast.unparse(n.args[0]), {s for s, _ in names(n.args[1])}


def test_methods_ask_the_geometry_and_never_the_kind():
    found = []
    for file, tree in TREES.items():
        if file.startswith(METHOD_ROOMS):
            found += [f"{file}:{n} asks {what} for {t}" for n, what, types in asked_types(tree) for t in types & LAYERS]
            found += [f"{file}:{n} imports {m}" for m, n in imports(tree) if re.search(r"(^|\.)layers(\.|$)", m)]
    assert not found, "\n".join(found)


# -- kinds --------------------------------------------------------------------------------------------------------------------
def test_no_code_outside_the_kinds_asks_for_one():
    found = []
    for file, tree in outside("layers/", *DOORS).items():
        for n in code(tree):
            if isinstance(n, ast.Compare):
                asked = {s for s, _ in strings(n)} & set(KINDS)
                by_name = any(isinstance(x, ast.Attribute) and x.attr in ("kind", "name") for x in ast.walk(n))
                found += [f"{file}:{n.lineno} asks for {s!r}" for s in asked if by_name]
            if isinstance(n, ast.Subscript) and "kinds" in {s for s, _ in names(n.value)}:
                found += [f"{file}:{n.lineno} asks for {s!r}" for s, _ in strings(n.slice)]
        found += [f"{file}:{n} imports {m}" for m, n in imports(tree) if re.search(r"(^|\.)layers\.\w", m)]
    assert not found, "\n".join(found)


def test_no_code_outside_the_kinds_asks_what_module_a_base_layer_is():
    """`isinstance(layer.base_layer, nn.Linear)` is the same question."""
    found = []
    for file, tree in outside("layers/", *METHOD_ROOMS, *DOORS).items():
        for n, what, types in asked_types(tree):
            if types & LAYERS and re.search(r"base_layer|place|\bheld\b|get_base_layer", what):
                found.append(f"{file}:{n} asks whether {what} is {types & LAYERS}")
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_laws_hold_when_methods_kinds_and_classes_have_random_names(seed):
    paths = os.pathsep.join([str(ROOT.parent), *(p for p in sys.path if p)])
    run = subprocess.run(
        [sys.executable, "-m", "tests.laws.renamed", str(seed)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    passed = re.search(r"(\d+) passed, (\d+) cells, (\d+) refused, (\d+) methods", run.stdout)
    assert passed and int(passed[1]) >= 2 * int(passed[2]) and int(passed[4]) == len(METHODS)


# -- nothing twice ------------------------------------------------------------------------------------------------------------
def test_no_docstring_is_a_copy():
    seen = defaultdict(list)
    for file, tree in TREES.items():
        for n in ast.walk(tree):
            if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(n)):
                for sentence in re.split(r"(?<=[.:])\s+", " ".join(text.split())):
                    if len(sentence) > 80:
                        seen[sentence].append(f"{file}:{getattr(n, 'name', 'module')}")
    copies = {s: w for s, w in seen.items() if len(w) > 1}
    assert not copies, copies


def test_no_code_is_a_copy():
    """No run of eight statements' lines appears in two places."""
    seen: dict[tuple[str, ...], str] = {}
    found = []
    for file, tree in TREES.items():
        lines = [(n, line) for n, line in enumerate(ast.unparse(tree).splitlines(), 1)]
        lines = [
            (n, s.strip()) for n, s in lines if s.strip() and not s.strip().startswith(("import ", "from ", '"""'))
        ]
        for i in range(len(lines) - 8):
            run = tuple(s for _, s in lines[i : i + 8])
            if sum(map(len, run)) < 160:
                continue
            if run in seen and not seen[run].startswith(file):
                found.append(f"{file}:{lines[i][0]} repeats {seen[run]}: {run[0]}")
            seen.setdefault(run, f"{file}:{lines[i][0]}")
    assert not found, "\n".join(found)


# -- tests --------------------------------------------------------------------------------------------------------------------
TESTS = Path(__file__).parent
OWN_TEST_FROM = 60  # lines of a file that is more than names


def imported_by(path: Path) -> set[str]:
    """The modules that a file imports, at its top or later: `from a import b` may mean the module a.b."""
    found = set()
    for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(n, ast.Import):
            found |= {a.name for a in n.names}
        elif isinstance(n, ast.ImportFrom) and n.module and not n.level:
            found |= {n.module, *(f"{n.module}.{a.name}" for a in n.names)}
    return found


def test_every_file_has_a_test_that_imports_it():
    """What the whole library's tests reach by accident is no test of a file: one of them names it."""
    helpers = {f"tests.helpers.{p.stem}": imported_by(p) for p in (TESTS / "helpers").glob("*.py")}
    imported = set()
    for path in TESTS.rglob("test_*.py"):
        mine = imported_by(path)
        imported |= mine.union(*(helpers[m] for m in mine & set(helpers)))
    lacking = []
    for file, path in FILES.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        module = f"peft.{file.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__")
        if lines > OWN_TEST_FROM and module not in imported:
            lacking.append(f"{file} ({lines} lines): no test imports {module}")
    assert not lacking, "\n".join(lacking)


# -- size and honesty -----------------------------------------------------------------------------------------------------------
def test_a_method_is_one_short_file():
    sizes = {n: len(FILES[n].read_text(encoding="utf-8").splitlines()) for n in FILES if n.startswith("methods/")}
    sizes.pop("methods/__init__.py")
    assert sorted(sizes.values())[len(sizes) // 2] <= 150 and max(sizes.values()) < 220, sizes


def test_doors_hold_views_and_names_only():
    for file, tree in TREES.items():
        if file.startswith(DOORS):
            defined = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
            assert len(defined) <= 6, (file, [n.name for n in defined])


def test_nothing_is_left_for_later():
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    found = [f"{n}: {m[0]}" for n, p in FILES.items() if (m := marks.search(p.read_text(encoding="utf-8")))]
    defined = defaultdict(int)
    stubs = []
    for file, tree in TREES.items():
        for n in code(tree):
            if isinstance(n, ast.FunctionDef):
                body = [x for x in n.body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]
                stub = (
                    len(body) == 1 and isinstance(body[0], ast.Raise) and "NotImplementedError" in ast.unparse(body[0])
                )
                defined[n.name] += not stub
                stubs += [(f"{file}:{n.lineno}", n.name)] if stub else []
        found += [f"{file}:{n} {s!r}" for s, n in strings(tree) if re.search(r"not (yet )?implemented", s, re.I)]
    found += [f"{where} {name} is stated nowhere" for where, name in stubs if not defined[name]]
    assert not found, "\n".join(found)


def test_every_method_states_what_it_is():
    for name, m in METHODS.items():
        assert m.summary and m.formula and m.examples and m.summary.endswith("."), name
        assert sys.modules[m.__module__].__doc__ and m.config_class.__doc__, name
