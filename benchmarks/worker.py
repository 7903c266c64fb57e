"""One library's process: opens cases, gives outputs and samples. Speaks JSON lines with the session that started it."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import rows
from .case import Case, Unsupported


def serve() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes to the log
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    case: Case | None = None
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        try:
            reply: Any = None
            if order["do"] == "open":
                case = None  # before the next one is built: its memory
                case = rows.find(order["row"], order["case"], order["quick"])
                folder = Path(order["folder"])
                if not folder.exists():
                    folder.mkdir(parents=True)
                    case.fixture(folder)
                case.build(folder)
            elif order["do"] == "outputs":
                assert case is not None
                torch.save(outputs(case), order["file"])
            elif order["do"] == "sample":
                assert case is not None
                reply = case.sample()
            elif order["do"] == "who":
                import peft

                reply = {"version": peft.__version__, "file": peft.__file__}
            print(json.dumps({"ok": reply}), file=replies)
        except Unsupported as e:
            print(json.dumps({"unsupported": str(e)}), file=replies)
        except Exception:
            print(json.dumps({"error": traceback.format_exc()}), file=replies)


def outputs(case: Case) -> dict[str, Tensor]:
    """Of one run; of random ones, mean and variance over the draws."""
    if not case.draws:
        return {k: v.detach().float() for k, v in case.outputs().items()}
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for draw in range(case.draws):
        torch.manual_seed(1000 + draw)
        for k, v in case.outputs().items():
            v = v.detach().double()
            sums[k] = sums.get(k, 0) + v
            squares[k] = squares.get(k, 0) + v * v
    n = case.draws
    mean = {k: v / n for k, v in sums.items()}
    var = {k: (squares[k] / n - mean[k] ** 2).clamp_min(0) * n / (n - 1) for k in sums}
    return {**{f"mean {k}": v for k, v in mean.items()}, **{f"var {k}": v for k, v in var.items()}}


if __name__ == "__main__":
    serve()
