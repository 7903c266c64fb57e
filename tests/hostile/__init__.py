"""Hostile tests: mutated files, wrong values, crashes, threads. Seeded and bounded; `make fuzz` runs them for an hour.

`PEFT_FUZZ` is how many times as many inputs are tried as in the suite, and each multiple draws other inputs: `seed()`
is another one for each run then, and is printed with a failure by the test's parameters.
"""

from __future__ import annotations

import os

FACTOR = int(os.environ.get("PEFT_FUZZ", "1"))
ROUND = int(os.environ.get("PEFT_FUZZ_ROUND", "0"))


def examples(n: int) -> int:
    """How many inputs to try: `n` in the suite, `PEFT_FUZZ` times as many under `make fuzz`."""
    return n * FACTOR


def seed(n: int = 0) -> int:
    """The seed of a test that draws by itself: fixed in the suite, another one in each round of `make fuzz`."""
    return n + 1_000_003 * ROUND
