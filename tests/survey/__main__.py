"""`python -m tests.survey [--task base] [--types a,b] [--out file.json]`: the survey over all types, as a table."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections import Counter
from pathlib import Path

from .survey import survey, types_of


def main() -> None:
    parser = argparse.ArgumentParser(prog="survey", description=__doc__)
    parser.add_argument("--task", choices=["causal", "base"], action="append")
    parser.add_argument("--types", help="some types, by commas")
    parser.add_argument("--out", help="a JSON file for the rows")
    parser.add_argument("--limit", type=int, default=60, help="seconds for a type")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = []
    for task in args.task or ["causal", "base"]:
        wanted = args.types.split(",") if args.types else types_of(task)
        for name in [n for n in wanted if n in types_of(task)]:
            found = survey(name, task, args.limit)
            rows.append(found.row())
            print(
                f"{task:7}{name:34}{found.verdict:9}{found.adapted:4}{found.error:10.1e}{found.seconds:7.1f}s  {found.reason}",
                flush=True,
            )
            if args.out:
                Path(args.out).write_text(json.dumps(rows, indent=0))
    print(Counter((r["task"], r["verdict"]) for r in rows))


if __name__ == "__main__":
    main()
