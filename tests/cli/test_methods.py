"""`peft methods`: every method with what it does, and every form with what it supports."""

from __future__ import annotations

from typing import Any

from peft import registry
from peft.cli.methods import SUPPORTS


def test_methods_are_listed_with_their_formula(peft: Any) -> None:
    said = peft("methods")
    for name, method in registry.methods().items():
        assert name.lower() in said.lower()
        detail = peft("methods", name)
        assert method.summary in " ".join(detail.split()) and method.config_class.__name__ in detail
    assert "Unknown method 'lorra'" in peft("methods", "lorra", code=2)


def test_the_forms_are_those_that_methods_have() -> None:
    assert {m.form for m in registry.methods().values()} == set(SUPPORTS)
