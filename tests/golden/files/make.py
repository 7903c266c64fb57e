"""Writes `files.json` and `adapters/`: `python make.py` for all methods, `python make.py LORA` for some.

The files are those that the library writes now. Do this where files are meant to change, and for a new method or example;
look at the difference before it is committed.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import golden_files as golden  # noqa: E402
import torch  # noqa: E402


def main(chosen: list[str]) -> None:
    torch.set_num_threads(1)
    known = golden.table() if golden.TABLE.exists() else {}
    found = {}
    for method in golden.own_methods():
        if chosen and method not in chosen:
            if method in known:
                found[method] = known[method]
            continue
        cells = list(golden.cells(method))
        found[method] = {cell.id: golden.describe(cell) for cell in cells}
        assert len(found[method]) == len(cells), f"{method}: two cells of one name"
        shutil.rmtree(golden.FOLDERS / method, ignore_errors=True)
        for cell in (c for c in cells if c.stored and "adapters" in found[method][c.id]):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                golden.write(cell, golden.FOLDERS / method)
        refused = sum("refused" in d for d in found[method].values())
        print(f"{method}: {len(cells)} cells, {refused} of them refused")
    golden.write_table(found)


if __name__ == "__main__":
    main(sys.argv[1:])
