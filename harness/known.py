"""Known issues: waivers that name a thread or a findings page, match strictly, and turn red when the problem is gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from enum import StrEnum

from harness.case import Case
from harness.verdict import Finding, Stage, Status, Verdict


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
    exactly `status` with `text` in the verdict's reason. expires: the last day it does, None for ever; expired: that day is
    over; quarantine: until then its cases are not launched at all; sometimes: the failure hangs on what memory held, so that a
    pass is no news."""

    id: str
    link: str
    backend: str
    arch: str
    match: Mapping[str, tuple[int | str, ...]]
    status: Status
    text: str
    expires: date | None = None
    expired: bool = False
    quarantine: bool = False
    sometimes: bool = False

    def applies(self, verdict: Verdict) -> bool:
        """Does this issue speak about that case on that subject and arch? Skipped verdicts say nothing."""
        if verdict.status.skipped:
            return False
        return self.speaks_of(verdict.case_id, verdict.subject, verdict.environment.get("arch", self.arch))

    def speaks_of(self, case_id: str, subject: str, arch: str) -> bool:
        """Is this case on this subject and arch one of its cases?"""
        if subject != self.backend or arch != self.arch:
            return False
        axes = Case.parse(case_id).axes
        return all(axes.get(name) in values for name, values in self.match.items())

    def excuses(self, verdict: Verdict) -> bool:
        """The very failure, not merely some failure."""
        return verdict.status is self.status and self.text in verdict.reason


def of_any_size(issues: Iterable[KnownIssue], sizes: Iterable[str]) -> tuple[KnownIssue, ...]:
    """The issues for cases between the plan's levels, which are what an entry lists for the axes in `sizes`."""
    unlisted = frozenset(sizes)
    return tuple(replace(i, match={axis: v for axis, v in i.match.items() if axis not in unlisted}) for i in issues)


def mark(verdict: Verdict, issues: Iterable[KnownIssue]) -> Verdict:
    """The verdict with the id of the issue that applies to it, if any. One that expired excuses nothing: it is noted, and is
    gone like the others when its case passes."""
    expired = []
    for issue in issues:
        passed = verdict.status is Status.PASSED and not issue.sometimes
        if issue.applies(verdict) and (issue.excuses(verdict) or passed):
            if not issue.expired or verdict.status is Status.PASSED:
                return replace(verdict, known=issue.id)
            expired.append(Finding("known", f"known issue {issue.id} expired on {issue.expires}: {issue.link}"))
    return replace(verdict, notes=(*verdict.notes, *expired)) if expired else verdict


def held(case_id: str, subject: str, arch: str, issues: Iterable[KnownIssue]) -> KnownIssue | None:
    """The issue that keeps this case from being launched, if any: it would kill its process, or the device's driver."""
    return next((i for i in issues if i.quarantine and not i.expired and i.speaks_of(case_id, subject, arch)), None)


def in_quarantine(issue: KnownIssue, case_id: str, environment: dict[str, str]) -> Verdict:
    """The skip of a case that such an issue holds."""
    reason = f"quarantined until {issue.expires}: {issue.link}"
    return Verdict(case_id, issue.backend, Status.UNAVAILABLE, Stage.SUPPORT, reason, environment=environment, known=issue.id)


def outcome(verdict: Verdict) -> Outcome:
    """Green, skipped, known, gone or red."""
    if verdict.status.skipped:
        return Outcome.SKIPPED
    if verdict.status is Status.PASSED:
        return Outcome.GONE if verdict.known else Outcome.GREEN
    return Outcome.KNOWN if verdict.known else Outcome.RED
