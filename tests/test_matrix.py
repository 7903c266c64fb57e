"""docs/matrix.md is what the registries give today."""

from matrix import PATH, render


def test_the_matrix_is_up_to_date():
    assert PATH.read_text(encoding="utf-8") == render(), "run `python tests/matrix.py`"
