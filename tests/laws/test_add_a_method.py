"""The example of docs/add-a-method.md is a complete method: it is executed and goes through the laws."""

import inspect
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from peft import registry
from tests.helpers.cells import cells, refusal
from tests.laws import test_laws

DOC = Path(__file__).parents[2] / "docs" / "add-a-method.md"


@pytest.fixture
def example():
    code = re.search(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.S).group(1)
    module = types.ModuleType("ssf_example")
    sys.modules["ssf_example"] = module
    exec(compile(code, str(DOC), "exec"), module.__dict__)
    yield "SSF"
    registry.forget_method("SSF")
    del sys.modules["ssf_example"]


def kinds_of(law) -> set[str]:
    """The kinds that a law is run on."""
    (given,) = (mark.args[1] for mark in law.pytestmark if mark.name == "parametrize")
    return {(one[0] if isinstance(one, tuple) else one).kind for one in given}


def test_the_example_passes_every_law_on_linear_and_on_one_example_of_each_kind(example, tmp_path):
    laws = [f for n, f in vars(test_laws).items() if n.startswith("test_") and "refusal" not in n]
    first: dict[str, list] = {}
    for cell in cells():
        if cell.method == example:
            first.setdefault(cell.kind, []).append(cell)
    assert "linear" in first
    ran = 0
    for group in first.values():
        cell = group[0]
        if refusal(cell) is not None:
            continue
        for law in laws:
            path = tmp_path / f"{ran}"
            extra = {"tmp_path": path} if "tmp_path" in inspect.signature(law).parameters else {}
            if cell.kind not in kinds_of(law):
                continue  # some laws leave kinds out, and say why
            if "dtype" in inspect.signature(law).parameters:
                extra["dtype"] = torch.bfloat16
            law(cell, **extra)
            ran += 1
    assert ran >= 10 * 2


def test_the_example_saves_under_its_own_keys(example):
    cell = next(c for c in cells() if c.method == example and c.kind == "linear")
    model, _ = cell.model()
    from peft import get_peft_model_state_dict

    assert set(get_peft_model_state_dict(model)) == {
        "base_model.model.site.ssf_scale",
        "base_model.model.site.ssf_shift",
    }
