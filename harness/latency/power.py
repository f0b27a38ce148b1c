"""How often would a comparison call a difference that is there, and one that is not? Simulated on recorded noise, pure."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from harness.latency.statistics import Call, Design, Round, decided


@dataclass(frozen=True)
class Power:
    """Of `trials` comparisons with B slower by `slowdown`: how often each call was made, and the rounds they took."""

    slowdown: float
    trials: int
    calls: dict[Call, int]
    rounds: float

    def share(self, call: Call) -> float:
        """Of the trials that made this call."""
        return self.calls.get(call, 0) / self.trials

    def all_of(self, call: Call, repeats: int) -> float:
        """The chance that so many comparisons in a row make this call."""
        return self.share(call) ** repeats


def pool(rounds: Sequence[Round]) -> list[float]:
    """What single processes deviate by in log time, from rounds of any two sides: half of what two of one side differ by,
    stretched to the variance of one process, with either sign. Between the sides may lie a true difference: not used."""
    differences = [first - second for sides in rounds for first, second in sides]
    return [sign * d / math.sqrt(2) for d in differences for sign in (1, -1)]


def simulated(noise: Sequence[float], slowdown: float, design: Design, trials: int, seed: int = 0) -> Power:
    """Comparisons of processes whose deviations are drawn from `noise`, decided as a real one is."""
    chance, shift = random.Random(f"{seed}/{slowdown}"), math.log1p(slowdown)
    calls, taken = Counter[Call](), 0
    for _ in range(trials):
        rounds: list[Round] = []
        found = None
        while found is None:
            a1, a2, b1, b2 = chance.choices(noise, k=4)
            rounds.append(((a1, a2), (b1 + shift, b2 + shift)))
            found = decided(rounds, design)
        calls[found.call] += 1
        taken += found.rounds
    return Power(slowdown, trials, dict(calls), taken / trials)
