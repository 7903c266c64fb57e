"""Files on disk stay what they are: each method's cells against `files.json`, and the folders of `adapters/` read and
written again byte for byte. make.py writes both.
"""

from __future__ import annotations

import warnings

import pytest

from tests.golden.files import golden_files as golden

AGAIN = "If files are meant to change, run tests/golden/files/make.py"


@pytest.mark.parametrize("method", sorted(golden.table()))
def test_a_methods_files_are_those_of_the_table(method):
    expected = dict(golden.table()[method])
    wrong = []
    for cell in golden.cells(method):
        old = expected.pop(cell.id, None)
        if old is None:
            wrong.append(f"{cell.id}: is not in the table")
            continue
        try:
            difference = golden.first_difference(old, golden.describe(cell))
        except Exception as e:
            difference = f"{type(e).__name__}: {e}"
        if difference is not None:
            wrong.append(f"{cell.id}: {difference}")
    wrong += [f"{name}: no such cell any more" for name in expected]
    assert not wrong, f"{method}, cell {wrong[0]}\n{len(wrong)} cells differ. {AGAIN} {method}."


@pytest.mark.parametrize("method", sorted(p.name for p in golden.FOLDERS.iterdir()))
def test_a_stored_folder_is_read_and_written_again_byte_for_byte(method, tmp_path):
    cell = next(c for c in golden.cells(method) if c.stored)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = cell.load(golden.FOLDERS / method)
    model.save_pretrained(tmp_path)
    golden.same_files(golden.FOLDERS / method, tmp_path)


def test_every_method_has_a_table_and_a_stored_folder():
    folders = {p.name for p in golden.FOLDERS.iterdir()}
    lacking = [m for m in golden.own_methods() if m not in golden.table() or m not in folders]
    assert not lacking, f"{', '.join(lacking)}: run tests/golden/files/make.py {' '.join(lacking)}"
