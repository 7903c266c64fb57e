"""`import peft` is light: names are imported when they are first asked for, and all of them are there."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import peft
from peft import registry

SOURCE = Path(peft.__file__)


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    paths = os.pathsep.join([str(SOURCE.parents[1]), *(p for p in sys.path if p)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_importing_and_asking_the_version_loads_nothing_heavy() -> None:
    loaded = json.loads(
        fresh(
            "import json, sys, peft; peft.__version__; from peft import recipes;"
            "print(json.dumps([m for m in ('torch', 'transformers', 'numpy', 'peft.core', 'peft.config') if m in sys.modules]))"
        )
    )
    assert loaded == []


@pytest.mark.parametrize(
    "code",
    [
        "from peft.registry import PeftType; print(PeftType.LORA.value)",
        "from peft.utils import PeftType; print(PeftType.LORA.value)",
        "from peft.utils.peft_types import PeftType; print(PeftType('LORA').value)",
        "from peft import PeftType; print(PeftType['LORA'].value)",
        "from peft.registry import PeftType; print(*[t.value for t in PeftType if t == 'LORA'])",
        "from peft.registry import PeftType; print(PeftType.__members__['LORA'].value)",
        "from peft.tuners.mixed import COMPATIBLE_TUNER_TYPES as types; print(types.LORA.value)",
        "from peft.config import PeftConfig; print(PeftConfig(peft_type='lora'.upper()).peft_type.value)",
        "import peft; peft.tuners.lora.LoraModel; peft.LoraModel; print(peft.LoraConfig().peft_type.value)",
        "import peft.tuners.lora as door; print(door.LoraConfig().peft_type.value)",
        "from peft.import_utils import is_bnb_available; from peft import *; print(LoraConfig().peft_type.value)",
        "import pickle, peft; print(pickle.loads(pickle.dumps(peft.PeftType.LORA)).value)",
    ],
)
def test_whatever_is_imported_first_knows_every_method(code: str) -> None:
    assert fresh(code + "; assert len(PeftType) > 20" if "PeftType;" in code else code) == "LORA"


def test_a_class_of_the_users_replaces_the_librarys_though_it_comes_first() -> None:
    code = """
from peft.contract.method import Method
from peft import registry
class Mine(Method):
    form = "delta"
    peft_type = "LORA"
print(registry.methods()["LORA"].__name__)
"""
    assert fresh(code) == "Mine"


def test_the_table_says_what_type_checkers_are_told() -> None:
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    told = {(a.asname, n.module) for n in block.body if isinstance(n, ast.ImportFrom) if n.module for a in n.names}
    assert told == set(peft.HOMES.items())


def test_every_name_is_listed_and_there() -> None:
    names = peft.__all__
    assert len(names) == len(set(names)) and set(names) <= set(dir(peft))
    assert {n for m in registry.modules() for n in getattr(m, "__all__", ())} <= set(names)
    for name in names:
        assert getattr(peft, name) is not None
    namespace: dict = {}
    exec("from peft import *", namespace)
    assert set(names) <= set(namespace)
    assert {"auto", "core", "helpers", "methods", "tuners", "utils", "__version__"} <= set(dir(peft))
    for missing in ("NoSuchConfig", "_private", "__wrapped__"):
        assert not hasattr(peft, missing)


def test_the_enum_of_methods_behaves_as_one() -> None:
    kinds = peft.PeftType
    assert kinds.LORA in kinds and kinds("LORA") is kinds["LORA"] is kinds.LORA == "LORA"
    assert list(kinds) == list(reversed(list(reversed(kinds)))) and len(list(kinds)) == len(kinds)
    assert "LORA" in dir(kinds) and set(kinds.__members__) >= set(registry.methods())
    with pytest.raises(ValueError, match="NOPE"):
        kinds("NOPE")
    with pytest.raises(KeyError):
        kinds["NOPE"]
    with pytest.raises(AttributeError, match="NOPE"):
        _ = kinds.NOPE
