"""What no case shows alone: the mean of z**2 of all a backend's real cases together, and of those that share a level.

A rounding too many in a sum of three adds a fifth to the variance: within the chance of one small case, far beyond that of
fifty. The errors of different cases are independent, so means pool by how many errors each holds. A case is in one pool of
every axis and in the whole, and spends FALSE_ALARM once more, in equal parts: a pool of m cases may be wrong in m parts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from harness.case import Case
from harness.compare import mean_z2_limit
from harness.ratio import FALSE_ALARM
from harness.verdict import Comparison, Status, Verdict

WHOLE = "all"
CONSTANT = ("op", "fill", "seed")  # axes that split no pool: only the real fill has a z


@dataclass(frozen=True)
class Pool:
    """The real cases of a subject that share `level` of `axis`: how many, the independent errors in them (`cases` and
    `independent`), the mean of their z**2 and its limit."""

    subject: str
    axis: str
    level: int | str
    cases: int
    independent: float
    mean_z2: float
    limit: float

    @property
    def alarms(self) -> bool:
        """True iff a right kernel's mean would not be so large."""
        return self.mean_z2 > self.limit

    @property
    def name(self) -> str:
        """The cases in words."""
        return "all its real cases" if self.axis == WHOLE else f"its real cases of {self.axis} {self.level}"

    def __str__(self) -> str:
        errors = f"{self.cases} cases, {self.independent:.0f} independent errors"
        return f"precision: mean z^2 {self.mean_z2:.3f} over {self.name} exceeds {self.limit:.3f} ({errors})"


def pools(verdicts: Iterable[Verdict]) -> list[Pool]:
    """Every pool of these verdicts, of each subject its own. Only what passed counts: the rest is red already."""
    found: dict[tuple[str, str, int | str], list[Comparison]] = defaultdict(list)
    parts = 1
    for verdict in verdicts:
        comparison = verdict.comparison
        if verdict.status is not Status.PASSED or comparison is None or comparison.lane != "real" or not comparison.independent:
            continue
        axes = {name: level for name, level in Case.parse(verdict.case_id).axes.items() if name not in CONSTANT}
        parts = len(axes) + 1
        for axis, level in {WHOLE: "", **axes}.items():
            found[verdict.subject, axis, level].append(comparison)
    return [_pool(*key, parts, comparisons) for key, comparisons in found.items()]


def _pool(subject: str, axis: str, level: int | str, parts: int, comparisons: list[Comparison]) -> Pool:
    errors = sum(c.independent for c in comparisons)
    mean = sum(c.mean_z2 * c.independent for c in comparisons) / errors
    limit = mean_z2_limit(errors, FALSE_ALARM * len(comparisons) / parts)
    return Pool(subject, axis, level, len(comparisons), errors, mean, limit)


def alarms(verdicts: Iterable[Verdict]) -> list[Pool]:
    """The worst pool beyond its limit of every subject that has one."""
    beyond = sorted((p for p in pools(verdicts) if p.alarms), key=lambda p: p.mean_z2 / p.limit)
    return list({pool.subject: pool for pool in beyond}.values())
