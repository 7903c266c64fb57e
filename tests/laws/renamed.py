"""Run some laws with every method, layer kind and method class under a random name: `python -m tests.laws.renamed SEED`.

The sources of `peft/methods`, what comes along with them, and `peft/layers` are rewritten as they are imported. Code elsewhere that asks for one of
them by name then asks for something that does not exist. Prints how many cells passed; any error is the exit status.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import random
import sys
import tempfile
from pathlib import Path

import pytest

FOLDERS = ("peft.methods", "peft.companions", "peft.variants", "peft.layers")
ROOT = Path(importlib.util.find_spec("peft").origin).parent


def sources() -> dict[str, ast.Module]:
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder.split(".")[1]).glob("*.py")):
            found[f"{folder}.{path.stem}"] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def names(trees: dict[str, ast.Module]) -> tuple[set[str], set[str]]:
    """(what methods and kinds are called, classes that only these folders know)."""
    strings, classes, public = set(), set(), set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes.add(node.name)
                for line in node.body:
                    for name, value in assigned(line):
                        if name in ("peft_type", "own_type", "name") and value:
                            strings.add(value)
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                public |= set(ast.literal_eval(node.value))
    return strings, {c for c in classes - public if not c.endswith("Config")}


def assigned(node: ast.AST) -> list[tuple[str, str]]:
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return [(t.id, node.value.value) for t in node.targets if isinstance(t, ast.Name)]
    return []


class Rename(ast.NodeTransformer):
    def __init__(self, strings: dict[str, str], classes: dict[str, str], mark: str) -> None:
        self.strings, self.classes, self.mark = strings, classes, mark

    def visit_Assign(self, node):
        self.generic_visit(node)
        if isinstance(node.value, ast.JoinedStr) and any(getattr(t, "attr", "") == "name" for t in node.targets):
            node.value.values.insert(0, ast.Constant(self.mark))  # a kind named for its number of axes
        if any(n in ("peft_type", "own_type", "name") for n, _ in assigned(node)):
            node.value.value = self.strings.get(node.value.value, node.value.value)
        return node

    def visit_ClassDef(self, node):
        self.generic_visit(node)
        node.name = self.classes.get(node.name, node.name)
        return node

    def visit_Name(self, node):
        node.id = self.classes.get(node.id, node.id)
        return node

    def visit_ImportFrom(self, node):
        for a in node.names:
            a.name = self.classes.get(a.name, a.name)
        return node


class Loader(importlib.machinery.SourceFileLoader):
    rename: Rename

    def get_code(self, fullname):
        tree = ast.parse(Path(self.path).read_text(encoding="utf-8"))
        return compile(ast.fix_missing_locations(self.rename.visit(tree)), self.path, "exec")


class Finder:
    def find_spec(self, name, path, target=None):
        if not name.startswith(tuple(f"{f}." for f in FOLDERS)):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.origin:
            spec.loader = Loader(name, spec.origin)
        return spec


def install(seed: int) -> dict[str, str]:
    rng = random.Random(seed)
    strings, classes = names(sources())

    def fresh(prefix: str) -> str:
        return prefix + "".join(rng.choices("bcdfghjklmnpqrstvwxz", k=9))

    table = {s: fresh("X").upper() if s.isupper() else fresh("x") for s in sorted(strings)}
    Loader.rename = Rename(table, {c: fresh("C") for c in sorted(classes)}, fresh("x"))
    sys.meta_path.insert(0, Finder())
    return table


def main(seed: int) -> None:
    table = install(seed)
    from torch import nn

    from peft import registry
    from peft.core.anatomy.walk import kind_of
    from tests.helpers import cells

    assert not (set(registry.methods()) | set(registry.kinds())) & set(table), "the names are not renamed"
    assert set(registry.methods()) <= set(table.values())
    plain = kind_of(nn.Linear(2, 2)).name
    others = [k for k, kind in registry.kinds().items() if k != plain and kind.examples()]
    rng = random.Random(seed)
    chosen = {(m, k) for m in registry.methods() for k in (plain, rng.choice(others))}
    seen: set[tuple[str, str]] = set()
    some = []
    for c in cells.cells():
        if (c.method, c.kind) in chosen and (c.method, c.kind) not in seen:
            seen.add((c.method, c.kind))
            some.append(c)
    cells.cells = lambda: some
    from tests.laws import test_laws as laws

    run = (
        laws.test_forward_equals_merged_and_unmerge_restores_the_bits,
        laws.test_save_and_load_give_the_same_output,
        laws.test_rows_of_a_batch_are_independent,
    )
    passed = 0
    for cell in laws.BUILT:
        for law in run:
            with tempfile.TemporaryDirectory() as folder:
                wanted = law.__code__.co_varnames[: law.__code__.co_argcount]
                try:
                    law(**{"cell": cell, **({"tmp_path": Path(folder)} if "tmp_path" in wanted else {})})
                except pytest.skip.Exception:
                    continue
                passed += 1
    print(f"{passed} passed, {len(laws.BUILT)} cells, {len(laws.REFUSED)} refused, {len(registry.methods())} methods")


if __name__ == "__main__":
    main(int(sys.argv[1]))
