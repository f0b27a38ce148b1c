"""Is it the same failure here? A signature is what a verdict says without its numbers."""

from __future__ import annotations

from enum import StrEnum

from harness.verdict import Verdict


class Outcome(StrEnum):
    """What judging a bundle's case again has shown."""

    SAME = "same failure"
    ANOTHER = "another failure"
    PASSES = "passes here"
    UNJUDGED = "not judged here"  # refused in advance: nothing was learnt


def signature(verdict: Verdict) -> tuple[str, ...]:
    """(status, the checks that failed, what the error looks like, the exception's type or the exit code of a death)."""
    evidence = verdict.findings[0].evidence if verdict.findings else {}
    cause = str(evidence.get("type") or evidence.get("exit_code") or "")[:80]
    checks = ",".join(sorted({finding.check for finding in verdict.findings}))
    return verdict.status.value, checks, verdict.diagnosis.kind if verdict.diagnosis is not None else "", cause


def compared(there: Verdict, here: Verdict) -> Outcome:
    """What `here` says of the failure `there`. Where nothing failed there, a failure here is another one."""
    if here.status.skipped:
        return Outcome.UNJUDGED
    if not here.status.failed:
        return Outcome.PASSES
    return Outcome.SAME if signature(here) == signature(there) else Outcome.ANOTHER
