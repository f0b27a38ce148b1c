"""An upgrade of several packages, tried part by part: each set of new versions is one text of pins, `a==1,b==4`, which takes
the place of a version in what the bisect tries: a case or a command over the overlay of it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from harness.errors import MoecheckError
from harness.versions import env
from harness.versions.attribute import Names
from harness.versions.bisect import Journal, Run, Try
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

    def pins(self, names: Names) -> str:
        """Everything's version with these packages new and all others old; one that comes or goes may be missing."""
        sides = ((n, (self.new if n in names else self.old).get(n)) for n in dict.fromkeys((*self.old, *self.new)))
        return ",".join(f"{n}=={version}" for n, version in sides if version is not None)

    def label(self, names: Names) -> str:
        """What is new in it: b==4."""
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


@dataclass
class Overlays:
    """The overlay of each text of pins, resolved once."""

    source: env.Source
    cache: Path
    made: dict[str, env.Overlay] = field(default_factory=dict)

    def __call__(self, text: str) -> env.Overlay:
        """CannotTell for pins that do not resolve."""
        if text not in self.made:
            self.made[text] = env.make(pins(text, "pins"), self.source, self.cache)
        return self.made[text]


class Recorded:
    """Answers from a journal first, in the order in which they were given, then by running; every run is written down."""

    def __init__(self, upgrade: Upgrade, attempt: Try, journal: Journal | None, watch: Callable[[str, Run], None]) -> None:
        self._upgrade, self._attempt, self._journal, self._watch = upgrade, attempt, journal, watch
        self.runs: list[Run] = list(journal.runs) if journal else []
        self._known: dict[str, list[Answer]] = defaultdict(list)
        for run in self.runs:
            self._known[run.version].append(run.answer)

    def __call__(self, names: Names) -> Answer:
        """One run of one set."""
        text = self._upgrade.pins(names)
        if self._known[text]:
            return self._known[text].pop(0)
        started = time.monotonic()
        outcome = self._attempt(text)
        run = Run(text, outcome.answer, outcome.text, round(time.monotonic() - started, 3))
        if self._journal is not None:
            self._journal.append(run)
        self.runs.append(run)
        self._watch(self._upgrade.label(names), run)
        return outcome.answer
