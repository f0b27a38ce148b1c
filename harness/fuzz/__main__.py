"""`make fuzz`: thousands of malformed inputs; the exit status says whether every one was read or clearly refused."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

from harness.fuzz.judge import complaint
from harness.fuzz.targets import Targets


def main(count: int, seed: int, only: int | None = None) -> int:
    """Judge `count` inputs of `seed`, or the one with number `only`; 1 if there are complaints."""
    refused: Counter[str] = Counter()
    total: Counter[str] = Counter()
    bad = 0
    with tempfile.TemporaryDirectory(prefix="moecheck-fuzz-") as base:
        targets = Targets(Path(base))
        for number in range(count) if only is None else (only,):
            attempt = targets.attempt(targets.names[number % len(targets.names)], Random(f"{seed}:{number}"))
            no, problem = complaint(attempt, targets.folder)
            refused[attempt.target] += no
            total[attempt.target] += 1
            if problem:
                bad += 1
                _say(f"{attempt.target}: {problem}\n  again: python -m harness.fuzz --seed {seed} --only {number}")
    for target in sorted(total):
        _say(f"{target}: {total[target]} inputs, {refused[target]} refused, {total[target] - refused[target]} still valid")
    _say(f"{sum(total.values())} malformed inputs (seed {seed}): {bad} complaints")
    return 1 if bad else 0


def _say(text: str) -> None:
    sys.stdout.write(text.encode(errors="backslashreplace").decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m harness.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one input")
    given = parser.parse_args()
    sys.exit(main(given.count, given.seed, given.only))
