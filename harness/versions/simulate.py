"""`python -m harness.versions.simulate`: how often, and in how many runs, each way to bisect finds a flaky bug."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from harness.versions.search import Answer, Found, Model, Next, Tally, step

MAX_RUNS = 20_000


@dataclass(frozen=True)
class Bug:
    """Appears at `first_bad`; then fails with probability `fails`; before it, `false` of the runs fail too."""

    first_bad: int
    fails: float
    false: float
    dice: random.Random

    def fails_at(self, version: int) -> bool:
        """One run."""
        return self.dice.random() < (self.fails if version >= self.first_bad else self.false)


Way = Callable[[int, Bug], tuple[int | None, int]]


def bayesian(n: int, bug: Bug, model: Model | None = None) -> tuple[int | None, int]:
    """(first bad version found, runs) of the search that moecheck uses, which knows neither rate."""
    seen, runs = Tally(n), 0
    while runs < MAX_RUNS and isinstance(now := step(seen, model or Model()), Next):
        seen.add(now.version, Answer.BAD if bug.fails_at(now.version) else Answer.GOOD)
        runs += 1
    return (now.first_bad if isinstance(now, Found) else None), runs


def repeated(times: int, needed: int) -> Way:
    """Plain bisection that runs each version `times` times and calls it bad from `needed` failures on."""

    def way(n: int, bug: Bug) -> tuple[int | None, int]:
        low, high, runs = 0, n - 1, 0
        while high - low > 1:
            middle = (low + high) // 2
            runs += times
            if sum(bug.fails_at(middle) for _ in range(times)) >= needed:
                high = middle
            else:
                low = middle
        return high, runs

    return way


WAYS: dict[str, Way] = {
    "bayesian": bayesian,
    "plain": repeated(1, 1),
    "5 x, any": repeated(5, 1),
    "5 x, most": repeated(5, 3),
    "5 x, all": repeated(5, 5),
}
RATES = ((1.0, 0.0), (1.0, 0.02), (0.5, 0.0), (0.5, 0.02), (0.1, 0.0), (0.1, 0.02))


def measure(way: Way, versions: int, fails: float, false: float, simulations: int) -> tuple[float, float, int]:
    """(share found, mean runs, most runs) over `simulations` bugs at random places; the same bugs for every way."""
    found, total, most = 0, 0, 0
    for seed in range(simulations):
        place = random.Random(f"place {seed}").randrange(1, versions)
        answer, runs = way(versions, Bug(place, fails, false, random.Random(f"dice {seed}")))
        found, total, most = found + (answer == place), total + runs, max(most, runs)
    return found / simulations, total / simulations, most


def main() -> None:
    """Print the figures of docs/versions.md, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=400)
    parser.add_argument("--simulations", type=int, default=500)
    options = parser.parse_args()
    console = Console(width=140, highlight=False)
    console.print(f"{options.versions} versions, {options.simulations} simulations: found / mean runs (most runs)")
    for fails, false in RATES:
        console.print(f"fails {fails:.0%}, false failures {false:.0%}")
        for name, way in WAYS.items():
            share, runs, most = measure(way, options.versions, fails, false, options.simulations)
            console.print(f"  {name:10} {share:6.1%} / {runs:.1f} ({most})")


if __name__ == "__main__":
    main()
