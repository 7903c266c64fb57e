"""docs/matrix.md and the README's table of methods are what the registries give today."""

from tests.laws.matrix import PATH, README, readme, render


def test_the_matrix_is_up_to_date():
    assert PATH.read_text(encoding="utf-8") == render(), "run `python -m tests.laws.matrix`"


def test_the_readme_lists_every_method():
    assert README.read_text(encoding="utf-8") == readme(), "run `python -m tests.laws.matrix`"
