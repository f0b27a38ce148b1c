"""An upgrade of several packages, tried part by part: an overlay for each set of new versions, a case or a command over it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from harness.errors import CannotTell, MoecheckError
from harness.regress import failure
from harness.select import Item
from harness.verdict import Status, Verdict
from harness.versions import env, judging
from harness.versions.attribute import Names
from harness.versions.bisect import Command, Journal, Outcome, Run
from harness.versions.search import Answer

AS_IT_WAS = "-"  # the set without a new version


@dataclass(frozen=True)
class Upgrade:
    """Exact versions before and after, name -> version."""

    old: Mapping[str, str]
    new: Mapping[str, str]

    @property
    def changed(self) -> tuple[str, ...]:
        """The names that move, arrive or go, in the order given."""
        return tuple(n for n in dict.fromkeys((*self.old, *self.new)) if self.old.get(n) != self.new.get(n))

    def pins(self, names: Names) -> dict[str, str]:
        """Everything's version with these packages new and all others old; one that comes or goes may be missing."""
        sides = ((n, (self.new if n in names else self.old).get(n)) for n in (*self.old, *(self.new.keys() - self.old.keys())))
        return {n: version for n, version in sides if version is not None}

    def label(self, names: Names) -> str:
        """The set in words: b==3,c==2."""
        moved = [f"{n}=={self.new[n]}" if n in self.new else f"{n} gone" for n in self.changed if n in names]
        return ",".join(moved) or AS_IT_WAS


def pins(text: str, option: str) -> dict[str, str]:
    """`a==1,b==2` as name -> version. MoecheckError for anything else."""
    found: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        try:
            wanted = Requirement(part)
        except InvalidRequirement as error:
            raise MoecheckError(f"{option} {part!r} is no requirement; wanted name==version, e.g. 'triton==3.6.0'") from error
        exact = [s.version for s in wanted.specifier if s.operator == "=="]
        name = canonicalize_name(wanted.name)
        if len(exact) != len(wanted.specifier) or len(exact) != 1 or "*" in exact[0] or name in found:
            raise MoecheckError(f"{option} {part!r}: wanted one exact version of each package, name==version")
        found[name] = exact[0]
    return found


Trial = Callable[[Names], Outcome]


@dataclass
class Overlays:
    """The overlay of each set of new versions, resolved once."""

    upgrade: Upgrade
    source: env.Source
    cache: Path
    made: dict[Names, env.Overlay] = field(default_factory=dict)

    def __call__(self, names: Names) -> env.Overlay:
        """CannotTell for a set that does not resolve."""
        if names not in self.made:
            self.made[names] = env.make(self.upgrade.pins(names), self.source, self.cache)
        return self.made[names]


@dataclass
class ByCase:
    """One case over the overlay of a set: good if it passes, bad if it fails as it `first` did, else cannot be told."""

    overlays: Overlays
    item: Item
    terms: judging.Terms
    first: str = ""

    def __call__(self, names: Names) -> Outcome:
        """Judge it once."""
        try:
            verdict = judging.judge(self.overlays(names), self.item, self.terms.platform, self.terms)
        except CannotTell as error:
            return Outcome(Answer.UNKNOWN, error.reason)
        outcome = of_verdict(verdict, self.first)
        self.first = outcome.text if outcome.answer is Answer.BAD else self.first
        return outcome


def of_verdict(verdict: Verdict, first: str = "") -> Outcome:
    """Good, bad, or, for a skip, a case that tests nothing and another failure than the `first`, cannot tell."""
    if verdict.status is Status.PASSED:
        return Outcome(Answer.GOOD, "PASSED")
    if verdict.status.skipped or verdict.status is Status.UNTRUSTED:
        return Outcome(Answer.UNKNOWN, f"{verdict.status}: {verdict.reason}")
    said = failure(verdict)
    return Outcome(Answer.BAD if said == (first or said) else Answer.UNKNOWN, said)


@dataclass
class ByCommand:
    """A command of the user's, with the overlay of a set in front of PYTHONPATH; `own`: it names {pins} and makes its own."""

    overlays: Overlays
    command: Command
    own: bool

    def __call__(self, names: Names) -> Outcome:
        """Run it once."""
        text = ",".join(f"{n}=={v}" for n, v in self.overlays.upgrade.pins(names).items())
        if self.own:
            return self.command(text)
        try:
            return self.command(text, judging.environment(self.overlays(names)))
        except CannotTell as error:
            return Outcome(Answer.UNKNOWN, error.reason)


class Recorded:
    """Answers from a journal first, in the order in which they were given, then by running; every run is written down."""

    def __init__(self, upgrade: Upgrade, trial: Trial, journal: Journal | None, watch: Callable[[Run], None]) -> None:
        self.upgrade, self._trial, self._journal, self._watch = upgrade, trial, journal, watch
        self.runs: list[Run] = list(journal.runs) if journal else []
        self._known: dict[str, list[Answer]] = defaultdict(list)
        for run in self.runs:
            self._known[run.version].append(run.answer)

    def __call__(self, names: Names) -> Answer:
        """One run of one set."""
        label = self.upgrade.label(names)
        if self._known[label]:
            return self._known[label].pop(0)
        started = time.monotonic()
        outcome = self._trial(names)
        run = Run(label, outcome.answer, outcome.text, round(time.monotonic() - started, 3))
        if self._journal is not None:
            self._journal.append(run)
        self.runs.append(run)
        self._watch(run)
        return outcome.answer
