"""Telling a failure that is there from one that comes and goes: signatures, and reruns in fresh children. Pure."""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from harness.case import Case
from harness.verdict import Finding, Status, Verdict

Judge = Callable[[Case], Verdict]
PASSES = 12  # in fresh children before "it passes": what fails once in three runs would pass them all once in 130
FAILURES = 4  # in a row before "it fails": what fails once in three runs does that once in 80


def signature(verdict: Verdict) -> str:
    """What kind of failure: the status, and what names it: the stage of a hang (a slow oracle is none of the kernel's), a
    signal or an exit code, an exception without its numbers, the first failed check, else the diagnosis. Two cases with one
    signature are taken for one defect."""
    finding = verdict.findings[0] if verdict.findings else None
    code = finding.evidence.get("exit_code") if finding is not None else None
    if verdict.status is Status.HUNG:
        return f"{verdict.status} during {verdict.stage}"
    if isinstance(code, int):
        return f"{verdict.status} {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
    if finding is not None and finding.check == "exception":
        return f"{verdict.status} {re.sub(r'0x[0-9a-fA-F]+|[0-9]+', '#', verdict.reason)}"
    if finding is not None:
        return f"{verdict.status} {finding.check}"
    return str(verdict.status) if verdict.diagnosis is None else f"{verdict.status} {verdict.diagnosis.kind}"


@dataclass(frozen=True)
class Answers:
    """What several fresh runs of one case said, in order."""

    verdicts: tuple[Verdict, ...]

    @property
    def signatures(self) -> Counter[str]:
        """How often each signature was seen."""
        return Counter(signature(v) for v in self.verdicts)

    @property
    def steady(self) -> bool:
        """Did they all say the same?"""
        return len(self.signatures) == 1

    @property
    def text(self) -> str:
        """CRASHED SIGSEGV in 3 of 12 fresh runs, PASSED in 9 of 12."""
        total = len(self.verdicts)
        first, *rest = sorted(self.signatures.items())
        return ", ".join(
            [f"{first[0]} in {first[1]} of {total} fresh runs", *(f"{name} in {n} of {total}" for name, n in rest)]
        )


def confirm(case: Case, fresh: Judge, more: Callable[[], bool] = lambda: True) -> Answers:
    """Judge alone again and again: until FAILURES said the same failure, PASSES said PASSED, or, once two answers differ,
    PASSES in all, so that the share of each is told; or until `more` says that there is no time."""
    verdicts: list[Verdict] = []
    while len(verdicts) < PASSES and (not verdicts or more()):
        verdicts.append(fresh(case))
        failed = verdicts[0].status is not Status.PASSED
        if verdicts[0].status.skipped or (failed and len(verdicts) == FAILURES and Answers(tuple(verdicts)).steady):
            break
    return Answers(tuple(verdicts))


@dataclass
class Steady:
    """A judge that does not change its mind: every case is judged once, a failure that no known issue excuses `reruns` times
    more in fresh children. What does not come again in all of them is UNSTABLE, and is kept in `flaky`."""

    judge: Judge
    fresh: Judge
    reruns: int
    flaky: list[Verdict] = field(default_factory=list)
    _said: dict[str, Verdict] = field(default_factory=dict)

    def __call__(self, case: Case) -> Verdict:
        """The one verdict on this case."""
        if case.id not in self._said:
            self._said[case.id] = self._decided(case)
        return self._said[case.id]

    def _decided(self, case: Case) -> Verdict:
        first = self.judge(case)
        if not first.status.failed or first.known:
            return first
        again = [self.fresh(case) for _ in range(self.reruns)]
        if all(signature(v) == signature(first) for v in again):
            return first
        verdict = unsteady(first, Answers(tuple(again)))
        self.flaky.append(verdict)
        return verdict


def unsteady(first: Verdict, again: Answers) -> Verdict:
    """The verdict on a case that failed once and then not, or not so: it depends on what ran before, or on nothing."""
    text = f"failed as {signature(first)}, then {again.text}"
    return replace(first, status=Status.UNSTABLE, reason=text, findings=(Finding("flaky", text), *first.findings))
