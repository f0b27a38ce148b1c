"""Known issues: waivers that name a thread or a findings page, match strictly, and turn red when the problem is gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from harness.case import Case
from harness.verdict import Status, Verdict


class Outcome(StrEnum):
    """What a verdict means for the run."""

    GREEN = "green"
    SKIPPED = "skipped"
    KNOWN = "known"  # fails exactly as its known issue says
    GONE = "gone"  # a known issue that no longer fails: its entry must go
    RED = "red"


@dataclass(frozen=True)
class KnownIssue:
    """One waiver. It applies to `backend` on `arch` where every axis in `match` has one of the listed values, and excuses
    exactly `status` with `text` in the verdict's reason."""

    id: str
    link: str
    backend: str
    arch: str
    match: Mapping[str, tuple[int | str, ...]]
    status: Status
    text: str

    def applies(self, verdict: Verdict) -> bool:
        """Does this issue speak about that case on that subject and arch? Skipped verdicts say nothing."""
        if verdict.subject != self.backend or verdict.status.skipped or verdict.environment.get("arch", self.arch) != self.arch:
            return False
        axes = Case.parse(verdict.case_id).axes
        return all(axes.get(name) in values for name, values in self.match.items())

    def excuses(self, verdict: Verdict) -> bool:
        """The very failure, not merely some failure."""
        return verdict.status is self.status and self.text in verdict.reason


def of_any_size(issues: Iterable[KnownIssue], sizes: Iterable[str]) -> tuple[KnownIssue, ...]:
    """The issues for cases between the plan's levels, which are what an entry lists for the axes in `sizes`."""
    unlisted = frozenset(sizes)
    return tuple(replace(i, match={axis: v for axis, v in i.match.items() if axis not in unlisted}) for i in issues)


def mark(verdict: Verdict, issues: Iterable[KnownIssue]) -> Verdict:
    """The verdict with the id of the issue that applies to it, if any."""
    for issue in issues:
        if issue.applies(verdict) and (issue.excuses(verdict) or verdict.status is Status.PASSED):
            return replace(verdict, known=issue.id)
    return verdict


def outcome(verdict: Verdict) -> Outcome:
    """Green, skipped, known, gone or red."""
    if verdict.status.skipped:
        return Outcome.SKIPPED
    if verdict.status is Status.PASSED:
        return Outcome.GONE if verdict.known else Outcome.GREEN
    return Outcome.KNOWN if verdict.known else Outcome.RED
