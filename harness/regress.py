"""What changed from one run to the next: statuses, diagnoses, the statistics of errors beyond noise, cells that no longer run.

Drift asks two questions of every backend x recipe, over the cases that passed in both runs: did the mean of z**2 change (the
ratio of two means of squared normal errors has an F distribution, its degrees of freedom the independent errors), and did
rel-L2 move the same way in too many of them (sign test)? LEVEL is the chance of any drift told between two runs of one kernel.
Cases that differ in tokens, experts, top_k, routing or skew alone share weights and rows of x, so their errors too: they are
one observation, with as many independent errors as the largest has.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from harness.case import ACTIVATION_FORMATS, SKEWS
from harness.executed import ran
from harness.known import Outcome, outcome
from harness.select import Item
from harness.steady import signature
from harness.verdict import Comparison, Status, Verdict
from reference.routing import RULES

LEVEL = 1e-3  # of all drift tests of one comparison together; each gets an equal part (Bonferroni)
ABSENT = "-"
MEAN_Z2, REL_L2 = "mean z^2", "rel-L2"


@dataclass(frozen=True, order=True)
class Moved:
    """One case that says something else: its status before and after (`-` where that run lacks it; `, known` where a known
    issue excuses it), why, and the line that judges it again."""

    subject: str
    case_id: str
    before: str
    after: str
    why: str
    rerun: str


@dataclass(frozen=True, order=True)
class Cell:
    """Backend x recipe x activation format, and how many cases executed it."""

    subject: str
    recipe: str
    activation_format: str
    cases: int


@dataclass(frozen=True, order=True)
class Drift:
    """A statistic that moved further than chance does: its mean before and after (rel-L2: geometric), their ratio with its
    standard error, over `pairs` cases of `shapes` that share no errors; p: the chance of that in two runs of one kernel."""

    subject: str
    recipe: str
    statistic: str
    before: float
    after: float
    ratio: float
    error: float
    pairs: int
    shapes: int
    p: float

    def __str__(self) -> str:
        moved = f"{self.before:.4g} -> {self.after:.4g}, ratio {self.ratio:.4f} +- {self.error:.4f}"
        count = f"{self.pairs} cases of {self.shapes} shapes"
        return f"{self.subject} {self.recipe}: {self.statistic} {moved} over {count}, p {self.p:.1g}"


@dataclass(frozen=True)
class Changes:
    """From one run to another. new_failures: red now, not red then; fixed: failed then, passes now; status: any other
    change of status; diagnosis: the same failing status, another signature. lost, gained: cells. environment: (name, before,
    after) of library versions and machine facts. compared: cases in both; tests: drift questions that shared LEVEL."""

    new_failures: tuple[Moved, ...] = ()
    fixed: tuple[Moved, ...] = ()
    status: tuple[Moved, ...] = ()
    diagnosis: tuple[Moved, ...] = ()
    drift: tuple[Drift, ...] = ()
    lost: tuple[Cell, ...] = ()
    gained: tuple[Cell, ...] = ()
    only_before: tuple[Item, ...] = ()
    only_after: tuple[Item, ...] = ()
    environment: tuple[tuple[str, str, str], ...] = ()
    compared: int = 0
    tests: int = 0
    level: float = LEVEL

    @property
    def regressed(self) -> bool:
        """Is there a new failure or a lost cell? Drift alone is told, and fails nobody: it may be an improvement."""
        return bool(self.new_failures or self.lost)

    @property
    def quiet(self) -> bool:
        """Nothing to tell but, at most, cases that only one of the runs has and versions that differ."""
        return not any((self.new_failures, self.fixed, self.status, self.diagnosis, self.drift, self.lost, self.gained))

    def to_json(self) -> dict[str, Any]:
        """Plain data; every number is finite."""
        return {**asdict(self), "regressed": self.regressed, "quiet": self.quiet}


def compare(before: Sequence[Verdict], after: Sequence[Verdict]) -> Changes:
    """The changes between the verdicts of two runs, at most one per case and subject in each."""
    old, new = ({Item(v.case_id, v.subject): v for v in run} for run in (before, after))
    moved = _moved(old, new)
    drift, tests = drifts(old, new)
    was, now = _cells(old.values()), _cells(new.values())
    return Changes(
        new_failures=tuple(sorted(moved["new"])),
        fixed=tuple(sorted(moved["fixed"])),
        status=tuple(sorted(moved["status"])),
        diagnosis=tuple(sorted(moved["diagnosis"])),
        drift=drift,
        lost=tuple(sorted(Cell(*cell, was[cell]) for cell in was.keys() - now.keys())),
        gained=tuple(sorted(Cell(*cell, now[cell]) for cell in now.keys() - was.keys())),
        only_before=tuple(sorted(old.keys() - new.keys())),
        only_after=tuple(sorted(new.keys() - old.keys())),
        environment=tuple(_environment(before, after)),
        compared=len(old.keys() & new.keys()),
        tests=tests,
    )


def _moved(old: Mapping[Item, Verdict], new: Mapping[Item, Verdict]) -> dict[str, list[Moved]]:
    found: dict[str, list[Moved]] = defaultdict(list)
    for item, now in new.items():
        was = old.get(item)
        if (kind := _kind(was, now)) is not None:
            why = now.reason if now.status.failed or was is None else f"was: {signature(was)}. {now.reason}".rstrip()
            found[kind].append(Moved(now.subject, now.case_id, _said(was), _said(now), why, now.rerun))
    return found


def _kind(was: Verdict | None, now: Verdict) -> str | None:
    if outcome(now) is Outcome.RED and (was is None or outcome(was) is not Outcome.RED):
        return "new"
    if was is None:
        return None
    if was.status is not now.status:
        return "fixed" if was.status.failed and now.status is Status.PASSED else "status"
    if now.status.failed and _failure(was) != _failure(now):
        return "diagnosis"
    return None


def _failure(verdict: Verdict) -> tuple[str, str]:
    return signature(verdict), verdict.diagnosis.kind if verdict.diagnosis else ""


def _said(verdict: Verdict | None) -> str:
    if verdict is None:
        return ABSENT
    kind = f" {verdict.diagnosis.kind}" if verdict.diagnosis and verdict.status.failed else ""
    return f"{verdict.status}{kind}{', known' if verdict.known else ''}"


def _parts(case_id: str) -> tuple[str, str, str]:
    """(recipe, activation format, id without its seed): the second part of every id is its recipe, the last its seed.
    `Case.parse` takes a quarter of a millisecond, and a night has 100,000 verdicts."""
    parts = case_id.split(".")
    form = next((p for p in parts if p in ACTIVATION_FORMATS), ACTIVATION_FORMATS[0])
    return parts[1] if len(parts) > 1 else "", form, case_id.rpartition(".")[0]


def _cells(verdicts: Iterable[Verdict]) -> Counter[tuple[str, str, str]]:
    return Counter((v.subject, *_parts(v.case_id)[:2]) for v in verdicts if ran(v))


def _environment(before: Iterable[Verdict], after: Iterable[Verdict]) -> Iterator[tuple[str, str, str]]:
    was, now = _facts(before), _facts(after)
    for name in sorted(was.keys() | now.keys()):
        old, new = (", ".join(sorted(facts.get(name, ()))) or ABSENT for facts in (was, now))
        if old != new:
            yield name, old, new


def _facts(verdicts: Iterable[Verdict]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for verdict in verdicts:
        for name, value in verdict.environment.items():
            found[name].add(str(value))
    return found


Pair = tuple[Comparison, Comparison]
Group = Mapping[str, Sequence[Pair]]  # of one backend x recipe: what shares errors -> its cases, before and after


def drifts(old: Mapping[Item, Verdict], new: Mapping[Item, Verdict], level: float = LEVEL) -> tuple[tuple[Drift, ...], int]:
    """The drifts beyond chance, and how many questions were asked: none where both runs have the same bits."""
    groups: dict[tuple[str, str], dict[str, list[Pair]]] = defaultdict(lambda: defaultdict(list))
    for item, pair in _pairs(old, new):
        groups[item.subject, _parts(item.case_id)[0]][_sharing(item.case_id)].append(pair)
    answers = (ask(key, group) for key, group in sorted(groups.items()) for ask in (_mean_z2, _rel_l2))
    asked = [drift for drift in answers if drift is not None]
    return tuple(d for d in asked if d.p <= level / len(asked)), len(asked)


def _sharing(case_id: str) -> str:
    """What cases have in common whose errors are not independent."""
    parts = case_id.split(".")
    return ".".join(p for p in parts if p not in SKEWS and p not in RULES and not (p[:1] in "tek" and p[1:].isdecimal()))


def _pairs(old: Mapping[Item, Verdict], new: Mapping[Item, Verdict]) -> Iterator[tuple[Item, Pair]]:
    """Cases that passed in both runs; what only one has is paired with the same case of another seed."""
    spare: dict[Item, list[Verdict]] = defaultdict(list)
    for item in sorted(old.keys() - new.keys()):
        spare[Item(_parts(item.case_id)[2], item.subject)].append(old[item])
    for item in sorted(new):
        mates = spare.get(Item(_parts(item.case_id)[2], item.subject))
        was = old.get(item) or (mates.pop() if mates else None)
        if was is not None and (a := _measured(was)) is not None and (b := _measured(new[item])) is not None:
            yield item, (a, b)


def _measured(verdict: Verdict) -> Comparison | None:
    comparison = verdict.comparison
    passed = verdict.status is Status.PASSED and comparison is not None
    return comparison if passed and comparison is not None and comparison.lane != "exact" and comparison.total else None


def _mean_z2(key: tuple[str, str], group: Group) -> Drift | None:
    """Of the real lane: elsewhere sigma is another kernel's. Standard error of a mean of n squares: its value x sqrt(2 / n)."""
    real = [
        [p for p in pairs if p[0].lane == p[1].lane == "real" and min(c.independent for c in p) > 0] for pairs in group.values()
    ]
    shapes = [pairs for pairs in real if pairs]
    sides = [[_pooled([p[side] for p in pairs]) for pairs in shapes] for side in (0, 1)]
    errors = [sum(n for _, n in side) for side in sides]
    if not shapes or min(errors) < 1:
        return None
    before, after = (sum(mean * n for mean, n in side) / total for side, total in zip(sides, errors, strict=True))
    if before == after or before <= 0 or after <= 0:  # the same bits, or no error at all
        return None
    ratio = after / before
    error = ratio * math.sqrt(2 / errors[0] + 2 / errors[1])
    count = sum(map(len, shapes)), len(shapes)
    return Drift(*key, MEAN_Z2, before, after, ratio, error, *count, _f_test(ratio, errors[1], errors[0]))


def _pooled(comparisons: Sequence[Comparison]) -> tuple[float, float]:
    """(mean of z**2, independent errors) of cases that share errors."""
    total = sum(c.independent for c in comparisons)
    return sum(c.mean_z2 * c.independent for c in comparisons) / total, max(c.independent for c in comparisons)


def _f_test(ratio: float, above: float, below: float) -> float:
    """Two-sided chance of such a ratio of two means of squared normal errors, `above` and `below` many (Paulson 1942)."""
    if ratio < 1:
        ratio, above, below = 1 / ratio, below, above
    root = ratio ** (1 / 3)
    a, b = 2 / (9 * above), 2 / (9 * below)
    return min(1.0, 2 * NormalDist().cdf(-((1 - b) * root - (1 - a)) / math.sqrt(b * root**2 + a)))


def _rel_l2(key: tuple[str, str], group: Group) -> Drift | None:
    sizes = [[(a.rel_l2, b.rel_l2) for a, b in pairs if a.rel_l2 > 0 and b.rel_l2 > 0] for pairs in group.values()]
    means = [(_log_mean(a for a, _ in pairs), _log_mean(b for _, b in pairs), len(pairs)) for pairs in sizes if pairs]
    moved = [row for row in means if row[0] != row[1]]
    if not moved:
        return None
    logs, n = [b - a for a, b, _ in moved], len(moved)
    mean = math.fsum(logs) / n
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in logs) / max(1, n - 1) / n)
    before, after = (math.exp(math.fsum(row[side] for row in moved) / n) for side in (0, 1))
    p = sign_test(sum(x > 0 for x in logs), n)
    return Drift(*key, REL_L2, before, after, math.exp(mean), math.exp(mean) * spread, sum(row[2] for row in moved), n, p)


def _log_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.fsum(logs) / len(logs)


def sign_test(ups: int, n: int) -> float:
    """Two-sided chance that of n fair coins at least as many agree as here, where `ups` are up; exact."""
    most = max(ups, n - ups)
    total = term = math.exp(math.lgamma(n + 1) - math.lgamma(most + 1) - math.lgamma(n - most + 1) - n * math.log(2))
    for k in range(most, n):
        term *= (n - k) / (k + 1)
        total += term
        if term < total * 1e-17:  # below the last bit of the sum
            break
    return min(1.0, 2 * total)
