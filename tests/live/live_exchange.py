"""The four processes of the exchange, and the table of what they measured.

python -m tests.live.live_exchange      runs the exchange and writes the table into docs/from-huggingface-peft.md
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from peft import registry
from tests.live.live_cases import CASES, HERE, TASKS, UPSTREAM, Case

REPOSITORY = Path(__file__).resolve().parents[2]
GUIDE = REPOSITORY / "docs" / "from-huggingface-peft.md"
HEADING = "## Largest differences measured"


class Exchange:
    """What each side made and read: `made[side][case]`, `read[reader][case, maker]`."""

    def __init__(self, root: Path, upstream: Path) -> None:
        self.root = root
        self.folders = {HERE: REPOSITORY / "src", UPSTREAM: upstream}
        self.made: dict[str, Any] = {}
        self.read: dict[str, Any] = {}

    def run(self) -> Exchange:
        self.root.mkdir(parents=True, exist_ok=True)
        for job, into in (("make", self.made), ("read", self.read)):
            if not all(self._left(side, job).exists() for side in (HERE, UPSTREAM)):
                self._processes(job)
            for side in (HERE, UPSTREAM):
                into[side] = torch.load(self._left(side, job), weights_only=True)
        return self

    def _left(self, side: str, job: str) -> Path:
        return self.root / f"{side}-{job}.pt"

    def _processes(self, job: str) -> None:
        """Both libraries at once."""
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
        started = {}
        for side, folder in self.folders.items():
            command = [sys.executable, "-m", "tests.live.live_worker", str(self.root), side, job]
            env = {**os.environ, **quiet, "PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}", "OMP_NUM_THREADS": "1"}
            with open(self.root / f"{side}-{job}.log", "w") as log:
                started[side] = subprocess.Popen(command, env=env, cwd=self.root, stdout=log, stderr=log)
        for side, process in started.items():
            if process.wait(900):
                raise RuntimeError((self.root / f"{side}-{job}.log").read_text()[-4000:])

    def expected(self, case: Case, maker: str) -> dict[str, Any]:
        """What the maker computed, or for files that no maker computed with, what upstream reads in them."""
        return self.read[UPSTREAM][case.name, maker] if case.strange else self.made[maker][case.name]

    def difference(self, case: Case, maker: str, reader: str) -> float:
        """The largest difference of any output; infinite where shapes differ."""
        expected, found = self.expected(case, maker), self.read[reader][case.name, maker]
        worst = 0.0
        for name, value in found["outputs"].items():
            other = expected["outputs"][name]
            if prompts_a_causal_model(case):  # there, upstream's results change with the padding that the first row has
                value, other = value[1:], other[1:]
            worst = max(worst, float((value - other).abs().max()) if value.shape == other.shape else float("inf"))
        return worst


def prompts_a_causal_model(case: Case) -> bool:
    forms = {m.config_class.__name__: m.form for m in registry.methods().values()}
    return TASKS.get(case.base) == "CAUSAL_LM" and forms.get(case.config) == "prompt"


def table(exchange: Exchange) -> str:
    """The largest difference of each method in both directions, in Markdown."""
    worst: dict[str, dict[str, float]] = defaultdict(lambda: {HERE: 0.0, UPSTREAM: 0.0})
    count: dict[str, dict[str, int]] = defaultdict(lambda: {HERE: 0, UPSTREAM: 0})
    for case in CASES.values():
        for maker, reader in case.ways:
            if maker != reader and reader not in case.refused and not case.apart:
                worst[case.row][reader] = max(worst[case.row][reader], exchange.difference(case, maker, reader))
                count[case.row][reader] += 1
    lines = ["| method | saved there, loaded here | saved here, loaded there |", "|---|---|---|"]
    for row, per in worst.items():
        cells = [f"{per[r]:.1e} ({count[row][r]} cases)" if count[row][r] else "–" for r in (HERE, UPSTREAM)]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(text: str, guide: Path = GUIDE) -> None:
    """Put the table below its heading, in place of what stands there."""
    before, _, after = guide.read_text().partition(HEADING)
    rest = after[after.index("\n## ") :] if "\n## " in after else ""
    how = "Largest absolute difference of any logit in fp32, as `python -m tests.live.live_exchange` measures it."
    guide.write_text(f"{before}{HEADING}\n\n{how}\n\n{text}\n{rest}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = table(Exchange(Path(folder)).run())
    write(made)
    print(made)
