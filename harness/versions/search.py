"""A bisect that survives flaky tests: which version is the first bad one, as a pure function of what was observed.

Versions are 0 .. n - 1, version 0 is said to be good, n - 1 to be bad, and the unknown is the first bad one, c. Versions from c
on fail at one rate, versions before at another, smaller one; neither is known. Both have a prior with a lump at certainty (a
deterministic bug fails always, a sound version never) and a Beta distribution beside it, so the rates can be integrated out:
the likelihood of c is the product of two Beta functions of the failures and passes on its two sides. The next version is the
one whose answer tells most about c in expectation (Bayesian bisection: Horstein 1963, Ben-Or and Hassidim 2008).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

PATIENCE = 100  # passes in a row at the bad end before it is called good: a bug of 5 % is missed in 0.6 % of all cases

CONFIDENCE = 0.998  # with the model below: at least 99 % found at every pair of rates of docs/versions.md


class Answer(StrEnum):
    """Of one run of one version."""

    GOOD = "good"
    BAD = "bad"
    UNKNOWN = "cannot tell"


@dataclass(frozen=True)
class Model:
    """What is believed before the first run. `certain_*` are probabilities; a rate that is not certain is Beta-distributed."""

    certain_bad: float = 0.5  # the bug fails every time
    certain_good: float = 0.3  # nothing fails before it
    false_failures: int = 19  # beside that lump: Beta(1, 19), 5 % in the mean, for versions before the bug; uniform after it
    verified: bool = False  # the ends are known to hold, and are not run


EXACT = Model(1.0, 1.0)  # reading a file twice gives the same
READ = Model(1.0, 1.0, verified=True)  # contracts: both ends are read to learn what good and bad are


@dataclass(frozen=True)
class Next:
    """Run this version next; `information`: bits about the first bad version that its answer is worth in expectation."""

    version: int
    information: float


@dataclass(frozen=True)
class Found:
    """The first bad version is one of `suspects`, versions in between that cannot be told apart, with this probability."""

    suspects: tuple[int, ...]
    confidence: float

    @property
    def first_bad(self) -> int:
        """The latest suspect: certainly bad, if the earlier ones could not be tested."""
        return self.suspects[-1]


@dataclass(frozen=True)
class Stopped:
    """No answer, and why."""

    reason: str


class Tally:
    """What was observed: failures and passes of each of n versions, and the versions that cannot be told."""

    def __init__(self, n: int, log: Iterable[tuple[int, Answer]] = ()) -> None:
        self.n, self.unknown = n, set[int]()
        self.fails, self.passes = np.zeros(n, np.int64), np.zeros(n, np.int64)
        for version, answer in log:
            self.add(version, answer)

    def add(self, version: int, answer: Answer) -> None:
        """One run more."""
        if answer is Answer.UNKNOWN:
            self.unknown.add(version)
        else:
            (self.fails if answer is Answer.BAD else self.passes)[version] += 1

    def classes(self) -> list[int]:
        """The first members of the groups of candidates that no test can tell apart: c - 1 and c differ at version c - 1."""
        return [1, *(c for c in range(2, self.n) if c - 1 not in self.unknown)]


def step(seen: Tally, model: Model, confidence: float = CONFIDENCE) -> Next | Found | Stopped:
    """What to do next: the version to run, or the answer. Both ends are verified first, the bad one before the good one,
    unless the model says that they are."""
    if not model.verified and (end := _end(seen)) is not None:
        return end
    try:
        chances = posterior(seen.fails, seen.passes, model)
    except ZeroDivisionError:
        return Stopped("a version passes that comes after one that fails: more than one change, or a flaky one")
    starts = seen.classes()
    masses = np.add.reduceat(chances, np.array(starts) - 1)
    best = int(masses.argmax())
    if masses[best] >= confidence:
        last = starts[best + 1] if best + 1 < len(starts) else seen.n
        return Found(tuple(range(starts[best], last)), float(masses[best]))
    bits = information(chances, seen.fails, seen.passes, model)
    bits[list(seen.unknown)] = -1.0
    return Next(int(bits.argmax()), float(bits.max()))


def _end(seen: Tally) -> Next | Stopped | None:
    """What the ends still need: a failure of the bad one, then a pass of the good one."""
    if seen.n < 2:
        return Stopped("there is nothing between the ends")
    if not seen.unknown.isdisjoint((0, seen.n - 1)):
        return Stopped("an end cannot be told")
    for version, wanted, other, text in (
        (seen.n - 1, seen.fails, seen.passes, "the bad end never fails"),
        (0, seen.passes, seen.fails, "the good end fails every time"),
    ):
        if not wanted[version]:
            tried = int(other[version])
            return Next(version, 0.0) if tried < PATIENCE else Stopped(f"{text} in {tried} runs")
    return None


def posterior(fails: Counts, passes: Counts, model: Model) -> Floats:
    """float64 [n - 1]: the probability that version 1 .. n - 1 is the first bad one; uniform before the first run.

    ZeroDivisionError when no version explains the counts, as a model of certain rates may find.
    """
    good, bad = _sides(fails), _sides(passes)
    logs = _log_good(good[0], bad[0], model) + _log_bad(good[1], bad[1], model)
    top = logs.max()
    if not np.isfinite(top):
        raise ZeroDivisionError
    weights = np.exp(logs - top)
    return np.asarray(weights / weights.sum())


def information(chances: Floats, fails: Counts, passes: Counts, model: Model) -> Floats:
    """float64 [n]: mutual information, in bits, of the first bad version and the outcome of one more run of each version."""
    (f0, f1), (s0, s1) = _sides(fails), _sides(passes)
    with np.errstate(invalid="ignore"):  # -inf - -inf where c is impossible
        before = np.exp(_log_good(f0 + 1, s0, model) - _log_good(f0, s0, model))  # chance of a failure before c, given c
        after = np.exp(_log_bad(f1 + 1, s1, model) - _log_bad(f1, s1, model))
    before, after = (np.where(chances > 0, p, 0.0) for p in (before, after))
    failure = _split(chances * after, chances * before)
    noise = _split(chances * _entropy(after), chances * _entropy(before))
    return np.asarray(_entropy(failure) - noise)


def rates(fails: Counts, passes: Counts, first_bad: int) -> tuple[float, float]:
    """Share of failures before and from the first bad version on, as observed."""
    out = []
    for part in (slice(None, first_bad), slice(first_bad, None)):
        total = int(fails[part].sum() + passes[part].sum())
        out.append(float(fails[part].sum()) / total if total else 0.0)
    return out[0], out[1]


def likelihoods(own: Counts, bad: Counts, good: Counts, model: Model) -> tuple[float, float]:
    """(P(has the bug), P(has it not)) of something that failed and passed `own` = [fails, passes] times, both equally likely
    before, where what has it gave `bad` and what has it not gave `good`; (0, 0) where neither can be."""
    logs = []
    for pool, log in ((bad, _log_bad), (good, _log_good)):
        before, after = (log(counts[:1], counts[1:], model)[0] for counts in (pool, pool + own))
        logs.append(after - before if np.isfinite(after) else -np.inf)
    top = max(logs)
    if not np.isfinite(top):
        return 0.0, 0.0
    weights = np.exp(np.array(logs) - top)
    return float(weights[0] / weights.sum()), float(weights[1] / weights.sum())


def _sides(counts: Counts) -> tuple[Counts, Counts]:
    """(sum before c, sum from c on) for c = 1 .. n - 1."""
    before = counts.cumsum()[:-1]
    return before, counts.sum() - before


def _split(if_after: Floats, if_before: Floats) -> Floats:
    """For each version v: the sum over c <= v of the first plus the sum over c > v of the second."""
    after = np.concatenate(([0.0], if_after.cumsum()))
    before = np.concatenate(([0.0], if_before.cumsum()))
    return np.asarray(after + before[-1] - before)


def _entropy(p: Floats) -> Floats:
    q = np.clip(p, 1e-15, 1 - 1e-15)
    return np.asarray(-q * np.log2(q) - (1 - q) * np.log2(1 - q))


def _log_bad(fails: Counts, passes: Counts, model: Model) -> Floats:
    return _mixed(model.certain_bad, passes == 0, _log_beta(fails + 1, passes + 1))


def _log_good(fails: Counts, passes: Counts, model: Model) -> Floats:
    b = model.false_failures
    return _mixed(model.certain_good, fails == 0, _log_beta(fails + 1, passes + b) + float(np.log(b)))


def _mixed(certain: float, fits: NDArray[np.bool_], log_beta: Floats) -> Floats:
    """log of: the lump where it fits the counts, and the Beta distribution beside it."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.logaddexp(np.log(np.where(fits, certain, 0.0)), np.log(1 - certain) + log_beta))


def _log_beta(a: Counts, b: Counts) -> Floats:
    table = _log_gamma(int((a + b).max()) + 1)
    return np.asarray(table[a] + table[b] - table[a + b])


_TABLE: list[Floats] = [np.zeros(2)]


def _log_gamma(size: int) -> Floats:
    """log Gamma(k) for k = 0 (unused) .. size."""
    if len(_TABLE[0]) <= size:
        steps = np.log(np.arange(1, 2 * size, dtype=np.float64))
        _TABLE[0] = np.concatenate(([0.0, 0.0], steps.cumsum()))
    return _TABLE[0]
