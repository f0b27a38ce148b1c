"""Times into statements, pure: a median with its interval, and whether B is slower than A beyond the noise of the session.

A comparison is made of rounds. In each, two fresh processes a side run the same calls in turn, and each process comes down to
one number, its log time. Fresh processes of one release differ, by where their memory lies, more than the calls of one do
(Kalibera and Jones 2013, Rigorous Benchmarking in Reasonable Time, section 6): so processes are the sample. What two of one
side differ by is the noise, measured in the same minute; Student's t over those differences gives the interval of the ratio.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

Pair = tuple[float, float]
Round = tuple[Pair, Pair]  # ((first, second process of A), (of B)): log times, each round with a zero of its own


class Call(StrEnum):
    """What a comparison says of B."""

    SLOWER = "slower"
    FASTER = "faster"
    SAME = "no difference"
    UNCLEAR = "cannot tell"


@dataclass(frozen=True)
class Design:
    """When to speak. least: the smallest difference worth naming; resolution: one this large is not overlooked when the
    answer is "no difference"; confidence: of the interval over all looks: 20 A/A in a row raise no false call with 99 %; first,
    most: rounds at the first and the last look.
    Each look gets an equal part of 1 - confidence (Bonferroni), so that looking again does not add false calls."""

    least: float = 0.01
    resolution: float = 0.03
    confidence: float = 0.9995
    first: int = 3
    most: int = 16

    @property
    def level(self) -> float:
        """Probability that the interval of one look misses the truth."""
        return (1 - self.confidence) / (self.most - self.first + 1)


@dataclass(frozen=True)
class Comparison:
    """ratio: time of B / time of A, within [low, high]; noise: standard deviation, in log time, of processes of one release,
    from `rounds` pairs a side."""

    call: Call
    ratio: float
    low: float
    high: float
    noise: float
    rounds: int
    confidence: float

    @property
    def text(self) -> str:
        """B is slower than A by 12.1 % +- 0.9 % (...)."""
        change, half = 100 * (self.ratio - 1), 50 * (self.high - self.low)
        how = f"{100 * self.confidence:g} % confidence; noise floor {100 * self.noise:.2f} %; {self.rounds} rounds"
        if self.call is Call.SAME:
            return f"no difference: B - A is {change:+.1f} % +- {half:.1f} % of A's time ({how})"
        if self.call is Call.UNCLEAR:
            low, high = 100 * (self.low - 1), 100 * (self.high - 1)
            return f"cannot tell: B - A is between {low:+.1f} % and {high:+.1f} % of A's time ({how})"
        return f"B is {self.call} than A by {abs(change):.1f} % +- {half:.1f} % ({how})"


def compared(rounds: Sequence[Round], design: Design) -> Comparison:
    """What these rounds, at least one, say. SLOWER or FASTER: the whole interval lies beyond `least`; SAME: it lies within
    `resolution`, and is not beyond `least`."""
    degrees = 2 * len(rounds)
    variance = sum((first - second) ** 2 / 2 for sides in rounds for first, second in sides) / degrees
    middle = statistics.fmean(statistics.fmean(b) - statistics.fmean(a) for a, b in rounds)
    half = student(1 - design.level / 2, degrees) * math.sqrt(variance / len(rounds))
    low, high = middle - half, middle + half
    if low > math.log1p(design.least):
        call = Call.SLOWER
    elif high < -math.log1p(design.least):
        call = Call.FASTER
    else:
        call = Call.SAME if max(-low, high) <= math.log1p(design.resolution) else Call.UNCLEAR
    return Comparison(
        call, math.exp(middle), math.exp(low), math.exp(high), math.sqrt(variance), len(rounds), design.confidence
    )


def decided(rounds: Sequence[Round], design: Design) -> Comparison | None:
    """The answer after these rounds; None to ask for another round."""
    if len(rounds) < design.first:
        return None
    found = compared(rounds, design)
    return None if found.call is Call.UNCLEAR and len(rounds) < design.most else found


@cache
def student(probability: float, degrees: int) -> float:
    """Quantile of Student's t for an even number of degrees of freedom, probability > 0.5, by bisection."""
    low, high = 0.0, 1.0
    while _t_below(high, degrees) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, degrees) < probability else (low, middle)
    return high


def _t_below(t: float, degrees: int) -> float:
    """P(T <= t), t >= 0: Abramowitz and Stegun 26.7.4, the finite sum for even degrees of freedom."""
    cos2 = degrees / (degrees + t * t)
    term = total = 1.0
    for k in range(1, degrees // 2):
        term *= cos2 * (2 * k - 1) / (2 * k)
        total += term
    return 0.5 + 0.5 * total * math.sqrt(1 - cos2)


def typical(times: Sequence[float], rotations: int, lowest: bool = False) -> float:
    """Log time of a slot of calls, call i on input i % rotations: medians input by input, and the mean of their logs. Inputs
    of another routing cost another time; a median over all of them would jump between two. lowest: minima in place of medians,
    for a host's clock: what a shared core does to a call only ever adds to its time."""
    middle = min if lowest else statistics.median
    values = [middle(times[start::rotations]) for start in range(min(rotations, len(times)))]
    return statistics.fmean(math.log(v) for v in values)


def process_values(slots: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """One log time a process from slots[process][block]: the median over blocks of its distance from the block's median,
    so that neither a drift of the clock nor a disturbed block counts."""
    middles = [statistics.median(block) for block in zip(*slots, strict=True)]
    return tuple(statistics.median(v - m for v, m in zip(mine, middles, strict=True)) for mine in slots)


@dataclass(frozen=True)
class Summary:
    """Of all calls, microseconds: the median, its 99 % interval [low, high], and the 5th and 95th percentile."""

    calls: int
    median_us: float
    low_us: float
    high_us: float
    p05_us: float
    p95_us: float


def summary(slots: Sequence[Sequence[float]], confidence: float = 0.99) -> Summary:
    """Of slots of calls in microseconds. The interval is of the slots' medians, by order statistics: neighbouring calls share
    a disturbance, so they are no sample."""
    calls = sorted(t for slot in slots for t in slot)
    medians = sorted(statistics.median(slot) for slot in slots)
    outer = outermost(len(medians), confidence)
    percentiles = (calls[round(q * (len(calls) - 1))] for q in (0.05, 0.95))
    middle = statistics.median(calls)  # of unequal slots it may lie beyond those of their medians
    return Summary(len(calls), middle, min(medians[outer], middle), max(medians[-1 - outer], middle), *percentiles)


def outermost(count: int, confidence: float) -> int:
    """The largest k such that [x_(k), x_(n-1-k)], counted from 0, holds the median with this probability (David and Nagaraja,
    Order Statistics, 7.1): of n = count sorted values; 0 where none does, the whole range then."""
    below, k = 0.0, 0
    for k in range(count // 2 + 1):
        below += math.comb(count, k) / 2**count
        if 2 * below > 1 - confidence:
            break
    return max(0, k - 1)
