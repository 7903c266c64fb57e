"""`python -m tests.survey [--task base] [--types a,b] [--out rows.json] [--docs page.md]`: the survey over all types."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections import Counter
from pathlib import Path

import transformers

from .survey import survey, types_of

Row = dict[str, object]


def page(rows: list[Row]) -> str:
    """The numbers, and what was left out or refused, as a page of the documentation."""
    lines = [
        "# All-linear LoRA on transformers' model types",
        "",
        f"Written by `make survey` with transformers {transformers.__version__}. Each type is built tiny from its default config with rules that",
        "know names of fields, not of models (`tests/survey/tiny.py`), with all weights random. All-linear LoRA with random factors",
        "must give what it gives merged, and every factor whose weight the plain model's loss depends on must have a gradient,",
        "in eval and in training (dropouts 0). Where fp32 rounding decides between near ties, in float64.",
        "",
        "| models | types | right | at fault | left out |",
        "|---|---|---|---|---|",
    ]
    count = Counter((r["task"], r["verdict"]) for r in rows)
    for task, name in (("causal", "causal language models"), ("base", "base models")):
        total = sum(n for (t, _), n in count.items() if t == task)
        lines.append(f"| {name} | {total} | {count[task, 'ok']} | {count[task, 'fault']} | {count[task, 'left out']} |")
    faults = [f"- {r['task']} `{r['model_type']}`: {r['reason']}" for r in rows if r["verdict"] == "fault"]
    passed = [f"- {r['task']} `{r['model_type']}`: {p}" for r in rows for p in r["passed_over"]]  # type: ignore[attr-defined]
    for title, found in (("At fault", faults), ("Layers passed over", passed)):
        lines += ["", f"## {title}", "", *(found or ["None."])]
    lines += ["", "## Left out", "", "Types that these rules build no running tiny model of, by the reason.", ""]
    reasons: dict[str, list[str]] = {}
    for r in rows:
        if r["verdict"] == "left out":
            reasons.setdefault(_sort(str(r["reason"])), []).append(f"{r['model_type']}")
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines.append(f"- {reason} ({len(names)}): {', '.join(dict.fromkeys(names))}")
    return "\n".join([*lines, ""])


def _sort(reason: str) -> str:
    if reason.endswith("million parameters"):
        return "too many parameters"
    if reason.startswith("build"):
        return "the shrunk config builds no model"
    if reason.startswith("forward"):
        return "none of the inputs tried fits its forward"
    return reason.partition(":")[0].partition("(")[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(prog="survey", description=__doc__)
    parser.add_argument("--task", choices=["causal", "base"], action="append")
    parser.add_argument("--types", help="some types, by commas")
    parser.add_argument("--out", help="a JSON file for the rows")
    parser.add_argument("--docs", help="a page for the numbers")
    parser.add_argument("--limit", type=int, default=60, help="seconds for a type")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    for task in args.task or ["causal", "base"]:
        wanted = args.types.split(",") if args.types else types_of(task)
        for name in [n for n in wanted if n in types_of(task)]:
            found = survey(name, task, args.limit)
            rows.append(found.row())
            numbers = f"{found.adapted:4}{found.error:10.1e}{found.seconds:7.1f}s"
            print(f"{task:7}{name:34}{found.verdict:9}{numbers}  {found.reason}", flush=True)
            if args.out:
                Path(args.out).write_text(json.dumps(rows, indent=0), encoding="utf-8")
    if args.docs:
        Path(args.docs).write_text(page(rows), encoding="utf-8")
    print(Counter((r["task"], r["verdict"]) for r in rows))


if __name__ == "__main__":
    main()
