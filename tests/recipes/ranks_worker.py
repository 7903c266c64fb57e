"""One of the processes of test_ranks.py, started by torchrun: its folder, and a JSON file of commands.

Runs them one after the other; writes for each its exit code and what it printed. A command may differ on rank 1.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from typer.testing import CliRunner

from peft.cli import console as shared
from peft.cli.main import app
from peft.recipes import ranks

if __name__ == "__main__":
    os.chdir(sys.argv[1])
    shared.console.width = shared.errors.width = 200
    ranks.leave = lambda: None  # the processes go on together
    found = []
    for number, commands in enumerate(json.loads(Path("commands.json").read_text())):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # each is a run of its own
        result = CliRunner().invoke(app, commands[min(ranks.rank(), len(commands) - 1)])
        found.append({"code": result.exit_code, "said": result.output, "error": repr(result.exception)})
        if ranks.rank() == 0:
            found[-1]["folder"] = sorted(str(p) for p in Path("two").rglob("*"))
        Path(f"found-{ranks.rank()}.json").write_text(json.dumps(found))
