"""From verdicts on a planted fault to its score: which lane killed it, how soon, and what the diagnosis called it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

from harness.case import Case
from harness.diagnose import KINDS
from harness.faults.fault import Fault
from harness.pooled import alarms
from harness.relations import CHECKS
from harness.select import Item
from harness.verdict import Status, Verdict

LANES = ("exact", "real", "mean z2", "pooled z2", "state", "memory", "relation", "contract", "isolation")
MEMORY = ("input_mutated", "red_zone", "out_overrun", "aliasing", "never_written", "poison")
ISOLATED = (Status.CRASHED, Status.HUNG, Status.OUT_OF_MEMORY)
LITERAL = (
    "zeros",
    "non_finite",
    "never_written",
    "nan_from_padding",
    "unstable",
    "tail_tile",
)  # read off the outputs themselves: never a lie
STATE = ("repeat", *(check.name for check in CHECKS if check.status is Status.UNSTABLE))
ENOUGH = 3  # kills in each fill after which more of the same say nothing new
LONGER = 24  # verdicts after the first kill: a bug that only one fill or one relation shows need not see the whole plan


class Until(StrEnum):
    """When the run moves on to the next fault: at its first kill, when more verdicts would say nothing new, or never."""

    FIRST = "first"
    ENOUGH = "enough"
    END = "end"


def lanes(verdict: Verdict) -> set[str]:
    """The lanes that rejected the subject in this verdict; empty if it passed or was skipped."""
    if not verdict.status.failed:
        return set()
    if verdict.status in ISOLATED:
        return {"isolation"}
    if verdict.status in (Status.MALFORMED, Status.CONTRACT):
        return {"contract"}
    found = {"memory" if f.check in MEMORY else "state" if f.check in STATE else "relation" for f in verdict.findings}
    if verdict.comparison is not None and not verdict.comparison.agrees:
        beyond = verdict.comparison.beyond or verdict.comparison.nonfinite
        found.add(verdict.comparison.lane if beyond else "mean z2")
    return found


def said(verdict: Verdict) -> str:
    """What the verdict calls the error: its diagnosis, else its first finding, else its status."""
    if verdict.diagnosis is not None:
        return verdict.diagnosis.kind
    return verdict.findings[0].check if verdict.findings else verdict.status.lower()


def _died(verdict: Verdict) -> bool:
    return any(finding.check == "death" for finding in verdict.findings)


@dataclass
class Score:
    """One fault's record. killed: lane -> verdicts that rejected it; fills: the same by fill; first: the case of the first
    kill, `after` so many verdicts and `seconds`; names: what killing verdicts called it; lies: diagnoses untrue of it;
    rejected: acceptance rule in use -> of so many `outputs` those that it would have rejected; strays: deaths, in words, that
    the fault does not explain and that did not come again."""

    fault: Fault
    verdicts: int = 0
    kills: int = 0
    killed: Counter[str] = field(default_factory=Counter)
    first: str = ""
    after: int = 0
    seconds: float = 0.0
    names: Counter[str] = field(default_factory=Counter)
    lies: dict[str, str] = field(default_factory=dict)
    fills: Counter[str] = field(default_factory=Counter)
    outputs: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    strays: list[str] = field(default_factory=list)

    def add(self, verdict: Verdict) -> None:
        """Count one verdict; UNTRUSTED ones are nobody's kill."""
        if verdict.status.skipped or verdict.status is Status.UNTRUSTED:
            return
        self.verdicts += 1
        self.outputs += bool(verdict.rules)
        self.rejected.update(rule for rule, accepted in verdict.rules.items() if not accepted)
        if not self.first:
            self.seconds += verdict.seconds
        if not verdict.status.failed:
            return
        self.kills += 1
        self.fills[Case.parse(verdict.case_id).fill] += 1
        self.killed.update(lanes(verdict))
        if not self.first:
            self.first, self.after = verdict.case_id, self.verdicts
        name = said(verdict)
        self.names[name] += 1
        if verdict.diagnosis is not None and name not in (*self.fault.expect, *LITERAL, "unexplained"):
            self.lies.setdefault(name, verdict.case_id)

    def settled(self, verdict: Verdict, again: Callable[[], Verdict]) -> Verdict:
        """The verdict, or after an unexplained death the one of another try: a machine without memory is nobody's kill."""
        if not _died(verdict) or "death" in self.fault.expect:
            return verdict
        second = again()
        if not _died(second):
            self.strays.append(f"{verdict.case_id}: {verdict.reason}")
        return second

    def pool(self, verdicts: Iterable[Verdict]) -> None:
        """Count what only all verdicts of the plan together show."""
        if not alarms(verdicts):
            return
        self.kills += 1
        self.killed["pooled z2"] += 1
        self.names["precision"] += 1
        if not self.first:
            self.first, self.after = "the whole plan", self.verdicts

    @property
    def done(self) -> bool:
        """True once cases of both fills have rejected it often enough, or it has been dead for long."""
        both = min(self.fills["exact"], self.fills["real"]) >= ENOUGH
        return both or (self.kills > 0 and self.verdicts - self.after >= LONGER)

    def caught_by(self, rule: str) -> bool:
        """Would a test with that rule have gone red: a crash or a malformed output shows with any rule."""
        return bool(self.rejected[rule] or self.killed["isolation"] or self.killed["contract"])

    @property
    def named(self) -> bool:
        """True iff most of the killing verdicts name a symptom that is true of the fault, and none lies. What a failed check
        is called (a relation, a state, an exception) says what was done and seen: it is always true."""
        right = sum(count for kind, count in self.names.items() if kind in self.fault.expect or kind not in KINDS)
        return not self.lies and 2 * right > self.kills > 0


def score(fault: Fault, items: Iterable[Item], judge: Callable[[str, str], Verdict], until: Until = Until.ENOUGH) -> Score:
    """Judge the fault on the clean twin's plan."""
    result, verdicts = Score(fault), []
    for item in items:
        ask = partial(judge, item.case_id, fault.name)
        verdicts.append(result.settled(ask(), ask))
        result.add(verdicts[-1])
        if (until is Until.FIRST and result.kills) or (until is Until.ENOUGH and result.done):
            return result
    result.pool(verdicts)
    return result
