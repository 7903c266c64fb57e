"""Runs cases in two long-lived workers, one per library, in turn; compares outputs, then collects figures."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .case import Case

ROOT = Path(__file__).resolve().parent.parent
OURS, UPSTREAM = "ours", "upstream"


class WorkerError(Exception):
    pass


class Unavailable(Exception):
    """The library cannot do what the case asks."""


class Worker:
    """A process that has one of the libraries on its path."""

    def __init__(self, label: str, library: Path, threads: int, clock: str) -> None:
        self.label = label
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        paths = [str(library), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "BENCHMARK_CLOCK": clock,
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
            "KINETO_LOG_LEVEL": "5",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            bufsize=1,
        )
        self.identity = self.ask(do="who")
        found = Path(self.identity["file"]).resolve().parent.parent
        if found != library.resolve():
            raise WorkerError(f"{label}: expected the library in {library}, the worker imported {found}")

    def ask(self, **order: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps(order), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.log.seek(0)
            raise WorkerError(f"{self.label}: the worker ended\n{self.log.read()[-3000:]}")
        reply = json.loads(line)
        if "unsupported" in reply:
            raise Unavailable(reply["unsupported"])
        if "error" in reply:
            raise WorkerError(f"{self.label}: {reply['error']}")
        return reply["ok"]

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=30)


def our_library() -> Path:
    """Where the `peft` lies that this Python would import."""
    spec = importlib.util.find_spec("peft")
    if spec is None or spec.origin is None:
        raise SystemExit("peft is not installed here; `make install` first")
    return Path(spec.origin).parent.parent


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], case: Case) -> dict[str, Any]:
    """The largest difference over all tensors, and whether it is within the case's tolerance."""
    if ours.keys() != theirs.keys() or any(ours[k].shape != theirs[k].shape for k in ours):
        odd = sorted(k for k in ours.keys() | theirs.keys() if k not in ours or k not in theirs)
        odd += [k for k in ours if k in theirs and ours[k].shape != theirs[k].shape]
        return {"same": False, "text": f"different keys or shapes: {', '.join(odd[:4])}"}
    if not all(bool(t.isfinite().all()) for t in (*ours.values(), *theirs.values())):
        return {"same": False, "text": "not finite"}
    idle = [k for k in ours if not k.startswith("var ") and not ours[k].any() and not theirs[k].any()]
    if idle:
        return {"same": False, "text": f"nothing but zeros on both sides: {', '.join(idle[:4])}"}
    if case.draws:
        return _compare_random(ours, theirs, case.draws)
    errors = {k: _relative(ours[k], theirs[k]) for k in ours}
    key = max(errors, key=lambda k: errors[k])
    largest = max(float((ours[k] - theirs[k]).abs().max()) for k in ours)
    text = f"{errors[key]:.1e} relative (at most {case.tolerance:g}), {largest:.1e} absolute, {len(errors)} tensors"
    same = errors[key] <= case.tolerance
    return {"same": same, "text": text, "relative": errors[key], "absolute": largest, "where": key}


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    scale = float(b.norm())
    return float((a - b).norm()) / scale if scale else float(a.norm())


def _compare_random(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], draws: int) -> dict[str, Any]:
    """Means differ by about one standard error if the distributions agree; their variances by little overall."""
    z, gap, ratio = 1.0, 0.0, 1.0
    for k in (k.removeprefix("mean ") for k in ours if k.startswith("mean ")):
        (m1, v1), (m2, v2) = ((side[f"mean {k}"], side[f"var {k}"]) for side in (ours, theirs))
        error = (v1 + v2) / draws
        score = float(((m1 - m2).square().sum() / error.sum().clamp_min(1e-30)).sqrt())
        spread = float(v1.sum() / v2.sum().clamp_min(1e-30))
        z = score if abs(score - 1) > abs(z - 1) else z
        ratio = spread if abs(spread - 1) > abs(ratio - 1) else ratio
        gap = max(gap, _relative(m1, m2))
    text = f"means of {draws} draws {z:.2f} standard errors apart (1 expected, at most 2), variances {ratio:.2f} ×"
    return {"same": z <= 2 and 0.5 <= ratio <= 2, "text": text, "errors": z, "variances": ratio, "relative": gap}


def spread(samples: list[float]) -> dict[str, Any]:
    """Median and quartiles."""
    q = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    return {"median": q[1], "low": q[0], "high": q[2], "samples": samples}


def run_case(
    row: str,
    case: Case,
    workers: dict[str, Worker],
    folder: Path,
    repeats: int,
    budget: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Open the case in each worker, compare the outputs, then sample in turn: `repeats` rounds, fewer for a library
    that has used up its budget of seconds."""
    result: dict[str, Any] = {"figures": {}, "unsupported": {}}
    order = {"row": row, "case": case.name, "quick": case.quick, "folder": str(folder / row / case.name)}
    running: dict[str, Worker] = {}
    found: dict[str, dict[str, torch.Tensor]] = {}
    # upstream opens first: where a case reads files, they are upstream's
    for label in [n for n in (UPSTREAM, OURS) if n in workers and not (case.only_ours and n == UPSTREAM)]:
        say(f"{label} builds")
        try:
            workers[label].ask(do="open", **order)
            file = folder / f"{label}.pt"
            workers[label].ask(do="outputs", file=str(file))
            found[label] = torch.load(file, weights_only=True)
            running[label] = workers[label]
        except Unavailable as e:
            result["unsupported"][label] = str(e)
    if len(found) == 2:
        result["difference"] = compare(found[OURS], found[UPSTREAM], case)
        if not result["difference"]["same"]:
            result["refused"] = f"outputs differ: {result['difference']['text']}"
            return result
    samples: dict[str, list[dict[str, float]]] = {label: [] for label in running}
    spent = dict.fromkeys(running, 0.0)
    repeats = min(repeats, case.rounds or repeats)
    for k in range(repeats):
        for label in [n for n in (OURS, UPSTREAM) if n in running and (not k or spent[n] < budget)]:
            say(f"{label} round {k + 1} of {repeats}")
            start = time.monotonic()
            samples[label].append(running[label].ask(do="sample"))
            spent[label] += time.monotonic() - start
    for name, figure in case.figures.items():
        entry: dict[str, Any] = {
            "unit": figure.unit,
            "what": figure.what,
            "reach": [r.text for r in figure.reach],
        }
        for label, rounds in samples.items():
            values = [r[name] for r in rounds if name in r]
            if values:
                entry[label] = spread(values)
        if figure.reach and OURS in entry:
            ours, theirs = entry[OURS]["median"], entry[UPSTREAM]["median"] if UPSTREAM in entry else None
            verdicts = [r.test(ours, theirs) for r in figure.reach]
            entry["met"] = False if False in verdicts else None if None in verdicts else True
        result["figures"][name] = entry
    return result
