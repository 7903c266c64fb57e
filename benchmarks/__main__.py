"""python -m benchmarks [ROW ...]: measure this library beside upstream, print the table, write JSON and a plot."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import report, rows
from .session import OURS, ROOT, UPSTREAM, Worker, WorkerError, our_library, run_case

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"all by default: {', '.join(rows.NAMES)}")
    parser.add_argument("--case", action="append", help="only cases whose name contains this; may be repeated")
    parser.add_argument("--repeats", type=int, default=5, help="rounds in which the libraries take turns (5)")
    parser.add_argument("--budget", type=float, default=40, help="seconds of a case after which a library rests (40)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, measures nothing")
    parser.add_argument("--upstream", default=str(ROOT / ".venv" / "upstream"), help="its folder, or `none`")
    parser.add_argument("--threads", type=int, default=1, help="of each worker (1)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a busy machine")
    parser.add_argument("--out", type=Path, help="the JSON file; by default written when all rows ran")
    parser.add_argument("--render", type=Path, help="measure nothing: table and plot of this JSON file anew")
    chosen = parser.parse_args(argv)
    unknown = [r for r in chosen.rows if r not in rows.NAMES]
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(rows.NAMES)}")
    if chosen.upstream != "none" and not (Path(chosen.upstream) / "peft").is_dir() and chosen.render is None:
        parser.error(
            f"no upstream library in {chosen.upstream}; `make install` puts it there, `--upstream none` does without"
        )
    return chosen


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a log shows each case as it ends
    console = Console(width=None if sys.stdout.isatty() else 180)
    if options.render is not None:
        results = json.loads(options.render.read_text(encoding="utf-8"))
        report.write(results, options.render)
        report.into(PAGE, results)
        report.on_screen(results, console)
        return 0
    results, failed = measure(options, console)
    report.on_screen(results, console)
    complete = not (
        options.rows or options.case or options.quick or options.clock == "cpu" or UPSTREAM not in results["libraries"]
    )
    out = options.out or (RESULTS / "cpu.json" if complete else None)
    if out is not None:
        for file in report.write(results, out):
            console.print(f"wrote {file}", highlight=False)
        if complete and report.into(PAGE, results):
            console.print(f"wrote the table in {PAGE}", highlight=False)
    else:
        console.print("Nothing written: name a file with --out, or run all rows.", highlight=False)
    return 1 if failed else 0


def measure(options: argparse.Namespace, console: Console) -> tuple[dict[str, Any], bool]:
    results: dict[str, Any] = {"machine": report.machine(), "threads": options.threads, "clock": options.clock}
    results |= {"quick": options.quick, "libraries": {}, "rows": {}}
    failed, start = False, time.monotonic()
    folders = {OURS: our_library()}
    if options.upstream != "none":
        folders[UPSTREAM] = Path(options.upstream).resolve()
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
        ) as bar,
    ):
        task = bar.add_task("workers start")
        workers = {name: Worker(name, path, options.threads, options.clock) for name, path in folders.items()}
        results["libraries"] = {name: w.identity["version"] for name, w in workers.items()}
        for row in options.rows or rows.NAMES:
            entry: dict[str, Any] = {"title": rows.module(row).TITLE, "cases": {}}
            results["rows"][row] = entry
            for case in rows.cases(row, options.quick):
                if options.case and not any(part in case.name for part in options.case):
                    continue

                def say(text: str, where: str = f"{row}, {case.name}") -> None:
                    bar.update(task, description=f"{escape(where)}: {text}")

                try:
                    repeats = min(options.repeats, 2) if options.quick else options.repeats
                    found = run_case(row, case, workers, Path(folder), repeats, options.budget, say)
                except WorkerError as e:
                    found = {"figures": {}, "unsupported": {}, "error": str(e)}
                    for name, worker in workers.items():
                        if worker.process.poll() is not None:
                            workers[name] = Worker(name, folders[name], options.threads, options.clock)
                entry["cases"][case.name] = found
                failed |= "error" in found or "refused" in found
                tell(console, row, case.name, found)
        for worker in workers.values():
            worker.close()
    results["machine"]["load after"] = report.load()
    results["seconds"] = round(time.monotonic() - start)
    return results, failed


def tell(console: Console, row: str, case: str, found: dict[str, Any]) -> None:
    """One case's figures, as soon as they are known."""
    console.print(f"[bold]{row}[/] {escape(case)}", highlight=False)
    for problem in ("refused", "error"):
        if problem in found:
            console.print(f"  [red]{problem}:[/] {escape(found[problem])}", highlight=False)
    for name, reason in found["unsupported"].items():
        console.print(f"  {name}: not supported ({escape(reason)})", highlight=False)
    if "difference" in found:
        console.print(f"  [dim]outputs: {escape(found['difference']['text'])}[/]", highlight=False)
    for name, figure in found["figures"].items():
        cells = [
            f"{label} {report.shown(figure[label], figure['unit'])}" for label in (OURS, UPSTREAM) if label in figure
        ]
        if not cells:
            continue  # not offered by either
        goal = f"  reach {', '.join(figure['reach'])}: {report.VERDICT[figure.get('met')]}" if figure["reach"] else ""
        console.print(f"  {name:24} {escape('   '.join(cells))}{escape(goal)}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
