"""What a history answers: plain data, and when a drift is more than chance."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

ALPHA = 1e-3  # chance of a false alarm of drift in a whole history, over all its groups and both statistics


@dataclass(frozen=True)
class Seen:
    """A run, and how much it has. dated: "run.json" or "mtime"."""

    run: str
    started: str
    dated: str
    platform: str
    tier: str
    shard: str
    code: str
    verdicts: int
    failed: int


@dataclass(frozen=True)
class Regression:
    """A case that passed once and fails now. good, bad: the last run that passed it and the first one after that failed;
    runs: how many have failed it since; changed: what of the environment and of moecheck differs between the two."""

    subject: str
    case_id: str
    platform: str
    good: str
    good_started: str
    bad: str
    bad_started: str
    runs: int
    status: str
    reason: str
    replay: str
    good_versions: dict[str, str]
    bad_versions: dict[str, str]

    @property
    def changed(self) -> str:
        """ "torch 2.10 -> 2.11, ..."; "nothing that is recorded" where all is the same."""
        names = sorted({*self.good_versions, *self.bad_versions})
        pairs = [(name, self.good_versions.get(name, "-"), self.bad_versions.get(name, "-")) for name in names]
        return ", ".join(f"{name} {old} -> {new}" for name, old, new in pairs if old != new) or "nothing that is recorded"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "changed": self.changed}


@dataclass(frozen=True)
class Flake:
    """A case with both outcomes where nothing that is recorded differs, or a death that did not happen again in fresh children.
    failed of runs: over all versions under which it ever passed, or died without a repeat; vanished: such deaths; pattern: a
    letter for each run of any version, . passed, F failed; last: when it failed last, at these versions and this code."""

    subject: str
    case_id: str
    platform: str
    failed: int
    runs: int
    vanished: int
    pattern: str
    last: str
    status: str
    versions: dict[str, str]
    code: str


@dataclass(frozen=True)
class Slow:
    """A case and its seconds, over the runs that really ran it."""

    subject: str
    case_id: str
    arch: str
    median_s: float
    worst_s: float
    runs: int


@dataclass(frozen=True)
class Drift:
    """Error statistics of the same passed cases under two releases that came one after the other. cases: in both; mean_z2 of
    the cases of the real lane, pooled by their independent errors; rel_l2: geometric mean of new over old; z, t: both in
    standard deviations of no change; moved: beyond what chance does once in 1/ALPHA histories."""

    subject: str
    recipe: str
    arch: str
    old: str
    new: str
    cases: int
    old_mean_z2: float | None
    new_mean_z2: float | None
    z: float
    rel_l2: float | None
    t: float
    moved: bool


@dataclass(frozen=True)
class Matched:
    """What a history says of one known issue: the last run in which it failed as described, on how many cases; the last that
    judged any of its cases, and how many of them passed there; the last that held some back."""

    matched: str
    matched_started: str
    cases: int
    judged: str
    gone: int
    held: str


def drift_of(values: tuple[Any, ...], groups: int) -> Drift:
    """One group of `groups`: names, cases, errors, sums of mean_z2 * errors old and new, of log ratios and of their squares.

    z: the difference of two means of `errors` squared normal errors each, variance 2 mean**2 / errors, as if the two
    releases' errors were independent: too wide where they are not. t: the sum of log ratios over the root of their squares;
    if each sign were a coin's, P(|t| > x) <= 2 exp(-x**2 / 2) (Hoeffding 1963, theorem 2), with any number of cases.
    """
    *names, cases, errors, old_sum, new_sum, logs, squares = values
    old, new = (old_sum / errors, new_sum / errors) if errors else (None, None)
    z = 0.0 if old is None or new is None or not old + new else (new - old) / math.sqrt(2 * (old**2 + new**2) / errors)
    t = logs / math.sqrt(squares) if squares else 0.0
    share = ALPHA / (2 * max(1, groups))
    moved = abs(z) > -NormalDist().inv_cdf(share / 2) or t * t > 2 * math.log(2 / share)
    return Drift(*(*names, cases, old, new, z, math.exp(logs / cases), t, moved))
