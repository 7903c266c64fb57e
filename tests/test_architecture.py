"""The house rules, read from the sources: who may import whom, who may know what, and that nothing is stated twice.

Outside a method's file nothing asks which method it is dealing with, outside a kind's file nothing asks which kind. The
scan finds names in the code; `laws/renamed.py` runs laws with all of them replaced by random ones.
"""

from __future__ import annotations

import ast
import os
import re
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from peft import registry
from peft.contract.method import Method

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(registry.__file__).parent
PROJECT = Path(__file__).resolve().parents[1]
TEXTS = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(text, name) for name, text in TEXTS.items()}
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


# -- the stair ------------------------------------------------------------------------------------------------------------------
# From low to high. A file imports from rooms on lines above its own, and from its own line as long as no files import
# each other in a circle. Imports inside functions and under TYPE_CHECKING count like any other.
ROOMS = [
    "errors version local_files remote signatures config_values",
    "maths",
    "kernels",
    "contract",
    "registry config config_fields",
    "core.acting",
    "core.anatomy",
    "core.forms",
    "core.files",
    "core.adapted",
    "core.prompts",
    "core.injection",
    "core.load",
    "core.report",
    "core.model",
    "measure",
    "inits",
    "methods",
    "companions",
    "variants",
    "layers",
    "optimizers",
    "upstream",
    "peft auto mapping mapping_func mixed_model peft_model import_utils functional helpers utils tuners",  # doors
    "recipes",
    "cli",
]
STEP = {room: step for step, line in enumerate(ROOMS) for room in line.split()}

# What some rooms do not import although it lies below them ...
NEVER = {room: "core.adapted core.injection core.load core.model" for room in ("methods", "companions", "variants")}
# ... and those that may import nothing of the library but this, and themselves.
ONLY = {
    "maths": "errors",
    "contract": "errors version local_files remote signatures maths kernels",
    "layers": "errors contract core.anatomy core.acting kernels registry",
}

MODULES = {"peft." + f.removesuffix(".py").removesuffix("__init__").replace("/", ".").rstrip("."): f for f in TREES}
MODULES["peft"] = MODULES.pop("peft.")


def room_of(module: str) -> str:
    """`peft.core.files.keys` -> `core.files`; the package itself is the room `peft`, one of the doors."""
    _, *parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "core" else 1]) if parts else "peft"


class Import(NamedTuple):
    importer: str
    imported: str  # a module of this library, or the name of another one
    late: bool  # inside a function
    line: int

    def __str__(self) -> str:
        return f"{MODULES[self.importer]}:{self.line} imports {self.imported}"


def imports_of(module: str) -> Iterator[Import]:
    """Every import of a file: absolute, relative, late, under TYPE_CHECKING."""
    package = module.split(".") if MODULES[module].endswith("__init__.py") else module.split(".")[:-1]

    def below(node: ast.AST, late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(module, alias.name, late, child.lineno)
            elif isinstance(child, ast.ImportFrom):
                start = package[: len(package) - child.level + 1] if child.level else []
                source = ".".join([*start, *([child.module] if child.module else [])])
                for alias in child.names:
                    whole = f"{source}.{alias.name}"
                    yield Import(module, whole if whole in MODULES else source, late, child.lineno)
            else:
                yield from below(child, late or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    yield from below(TREES[MODULES[module]], False)


IMPORTS = [i for module in MODULES for i in imports_of(module)]
OWN = [i for i in IMPORTS if i.imported.split(".")[0] == "peft"]


def test_every_file_has_a_room_and_every_room_a_file():
    rooms = {room_of(module) for module in MODULES} - {"core"}  # `core` itself holds rooms and nothing else
    assert rooms == set(STEP), (sorted(rooms - set(STEP)), sorted(set(STEP) - rooms))


def test_imports_go_down_the_stair():
    """To a lower room or within the own line, never late; and no files import each other in a circle."""
    gone = [str(i) for i in OWN if i.imported not in MODULES]
    assert not gone, "\n".join(gone)
    top = len(ROOMS)  # a file without a room may be imported by nobody
    up = [
        f"{i}, which is higher"
        for i in OWN
        if STEP.get(room_of(i.imported), top) > STEP.get(room_of(i.importer), top - 1)
    ]
    late = [f"{i} late, which is for other libraries only" for i in OWN if i.late]
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for i in OWN:
        graph[i.importer].add(i.imported)
    circle = []
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        circle = ["a circle: " + " <- ".join(e.args[1])]
    found = up + late + circle
    assert not found, "\n".join(found)


@pytest.mark.parametrize("room", sorted({*NEVER, *ONLY}))
def test_rooms_that_know_less_than_lies_below_them(room):
    allowed = {room, *ONLY.get(room, " ".join(STEP)).split()} - set(NEVER.get(room, "").split())
    found = [str(i) for i in OWN if room_of(i.importer) == room and room_of(i.imported) not in allowed]
    assert not found, "\n".join(found)


# What is said on the standard output below cli/: file -> (function, why).
SAID = {
    "core/model/peft_model.py": ("print_trainable_parameters", "upstream's method, whose purpose is to print"),
    "core/load/embeddings.py": (
        "embedding_tensors",
        "upstream says so, too, when a small file grows by whole embeddings",
    ),
}


def test_only_the_command_line_prints():
    below = {n: t for n, t in TREES.items() if not n.startswith("cli/")}
    faces = [str(i) for i in IMPORTS if i.imported.split(".")[0] in ("typer", "rich") and MODULES[i.importer] in below]
    said, found = set(), []
    for file, tree in below.items():
        for f in (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))):
            said |= {(file, f.name) for n in ast.walk(f) if getattr(n, "id", "") == "print"}
        found += [file for n in ast.walk(tree) if getattr(n, "id", "") == "print"]
    assert not faces, "\n".join(faces)
    assert sorted(found) == sorted(SAID) and said == {(file, name) for file, (name, _) in SAID.items()}, (found, said)


def test_only_anatomy_asks_a_model_for_its_embedding():
    """By call, by `getattr` or as an attribute; texts that mention the name are none of these."""
    asked = "get_input_embeddings"
    found = []
    for file, tree in outside("core/anatomy/").items():
        found += [f"{file}:{line}" for s, line in strings(tree) + names(tree) if s == asked]
    assert not found, "\n".join(found)


def test_the_design_page_draws_the_stair():
    """A line for each line of ROOMS, in this order."""
    page = (PROJECT / "docs" / "design.md").read_text(encoding="utf-8")
    steps = []
    for indent, name in re.findall(r"^(│   )?[├└]── ([\w/]+)", page.split("```")[1], re.M):
        room = ("core." if indent else "") + name.rstrip("/").replace("__init__", "peft")
        steps += [] if room == "core" else [STEP[room]]
    assert steps == list(range(len(ROOMS)))


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
    own = {a.split(".")[-1] for m in METHODS.values() for a in m.table.own if m.prefix and a.startswith(m.prefix)}
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
    for file, text in TEXTS.items():
        lines = len(text.splitlines())
        module = f"peft.{file.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__")
        if lines > OWN_TEST_FROM and module not in imported:
            lacking.append(f"{file} ({lines} lines): no test imports {module}")
    assert not lacking, "\n".join(lacking)


# -- size and honesty -----------------------------------------------------------------------------------------------------------
LONG_FILES: dict[str, str] = {}
LONG_CLASSES: dict[str, str] = {}


def test_no_file_and_no_class_is_long():
    """350 and 300 lines; what is longer says why, and no longer stands here when it has become short."""
    files = {n: len(text.splitlines()) for n, text in TEXTS.items()}
    classes = {
        n.name: (n.end_lineno or n.lineno) - n.lineno + 1
        for tree in TREES.values()
        for n in ast.walk(tree)
        if isinstance(n, ast.ClassDef)
    }
    long_files = {n: size for n, size in files.items() if size > 350}
    long_classes = {n: size for n, size in classes.items() if size > 300}
    assert long_files.keys() == LONG_FILES.keys(), long_files
    assert long_classes.keys() == LONG_CLASSES.keys(), long_classes


def test_a_method_is_one_short_file():
    sizes = {n: len(TEXTS[n].splitlines()) for n in TEXTS if n.startswith(METHOD_ROOMS) and "__init__" not in n}
    assert statistics.median(sizes.values()) <= 95 and max(sizes.values()) <= 170, sizes


def test_the_contract_of_a_method_stays_small():
    """What the class `Method` states: methods, properties, class and instance annotations. A hook that only one
    method needs belongs into that method's file."""
    (method,) = (n for n in TREES["contract/method.py"].body if isinstance(n, ast.ClassDef) and n.name == "Method")
    members: set[str] = set()
    for n in method.body:
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            members.add(n.name)
        elif isinstance(n, ast.AnnAssign):
            members.add(ast.unparse(n.target))
        elif isinstance(n, ast.Assign):
            members |= {ast.unparse(t) for t in n.targets}
    assert len(members) <= 45, (len(members), sorted(members))


def lines_with(pattern: str, *but: str) -> list[str]:
    asked = re.compile(pattern)
    return [
        f"{n}:{k} {line.strip()}"
        for n, text in TEXTS.items()
        if not n.startswith(but)
        for k, line in enumerate(text.splitlines(), 1)
        if asked.search(line)
    ]


def test_few_lines_ask_for_the_form_of_a_method():
    found = lines_with(r"\.form\b", "contract/", "methods/")
    assert len(found) < 12, "\n".join(found)


TYPED = ("contract", "core", "methods")  # where mypy reports everything that it can
CODES = {"operator", "union-attr", "arg-type", "index"}  # what torch's `nn.Module.__getattr__` makes tedious elsewhere


def test_types_are_checked():
    """No code of mypy is off in the rooms of TYPED, and few lines are excused anywhere."""
    mypy = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    unchecked = set()
    for module in MODULES:
        if not module.startswith(tuple(f"peft.{room}" for room in TYPED)):
            continue
        off, skipped = set(mypy.get("disable_error_code", ())), mypy.get("ignore_errors", False)
        for override in mypy.get("overrides", ()):
            patterns = override["module"] if isinstance(override["module"], list) else [override["module"]]
            if any(f"{module}.".startswith(p.removesuffix("*").rstrip(".") + ".") for p in patterns):
                off = (off | set(override.get("disable_error_code", ()))) - set(override.get("enable_error_code", ()))
                skipped = override.get("ignore_errors", skipped)
        unchecked |= {module} if skipped or off & CODES else set()
    assert not unchecked, f"mypy reports less than it can in {len(unchecked)} files: {sorted(unchecked)[:5]} ..."
    assert not lines_with(r"#\s*mypy:")


def test_few_lines_are_excused_from_types():
    found = Counter(line.partition(":")[0] for line in lines_with("type: ignore"))
    assert found.total() <= 40, (found.total(), found.most_common())


def test_few_lines_say_any():
    found = Counter(line.partition(":")[0] for line in lines_with(r"\bAny\b"))
    assert found.total() <= 350, (found.total(), found.most_common())


def test_doors_hold_views_and_names_only():
    for file, tree in TREES.items():
        if file.startswith(DOORS):
            defined = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
            assert len(defined) <= 6, (file, [n.name for n in defined])


def test_nothing_is_left_for_later():
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    found = [f"{n}: {m[0]}" for n, text in TEXTS.items() if (m := marks.search(text))]
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
