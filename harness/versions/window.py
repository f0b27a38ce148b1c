"""The picture of a regression window: one plan over a list of releases, a row a case, a letter a verdict. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from harness.select import Item
from harness.verdict import Status, Verdict

LETTERS = {
    Status.PASSED: ".",
    Status.WRONG: "W",
    Status.MALFORMED: "M",
    Status.UNSTABLE: "U",
    Status.CORRUPTING: "X",
    Status.CRASHED: "C",
    Status.HUNG: "H",
    Status.OUT_OF_MEMORY: "O",
    Status.CONTRACT: "K",
    Status.UNSUPPORTED: "-",
    Status.UNAVAILABLE: "-",
    Status.UNTRUSTED: "T",
}
CANNOT_TELL = "?"
TELLS_NOTHING = (Status.UNSUPPORTED, Status.UNAVAILABLE, Status.UNTRUSTED)


@dataclass(frozen=True)
class Release:
    """One version: its verdicts by item, or the reason why it could not be tested."""

    version: str
    verdicts: Mapping[Item, Verdict] = field(default_factory=dict)
    reason: str = ""

    def bad(self, item: Item) -> bool | None:
        """Does it fail there? None where nobody can tell."""
        verdict = self.verdicts.get(item)
        return None if verdict is None or verdict.status in TELLS_NOTHING else verdict.status.failed


@dataclass(frozen=True)
class Span:
    """A stretch of bad releases of a case: the first and the last seen bad; before: the last one seen good, "" if none was;
    after: the first one seen good again, "" if none was. What lies between cannot be told."""

    first: str
    last: str
    before: str
    after: str

    def __str__(self) -> str:
        start = self.first if self.before else f"{self.first} or older"
        return f"{start} to {self.last if self.after else 'the newest tried'}"


def spans(releases: Sequence[Release], item: Item) -> tuple[Span, ...]:
    """The bad stretches of a case, oldest first."""
    told = [(r.version, bad) for r in releases if (bad := r.bad(item)) is not None]
    runs = [(bad, [v for v, _ in group]) for bad, group in itertools.groupby(told, key=lambda row: row[1])]
    found = []
    for i, (bad, versions) in enumerate(runs):
        if bad:
            before = runs[i - 1][1][-1] if i else ""
            after = runs[i + 1][1][0] if i + 1 < len(runs) else ""
            found.append(Span(versions[0], versions[-1], before, after))
    return tuple(found)


def letter(release: Release, item: Item) -> str:
    """Of one cell."""
    verdict = release.verdicts.get(item)
    return CANNOT_TELL if verdict is None else LETTERS[verdict.status]


def cells(releases: Sequence[Release], item: Item) -> list[str]:
    """The letters of a row, the first and the last bad release of all in brackets."""
    bad = [r.version for r in releases if r.bad(item)]
    ends = {bad[0], bad[-1]} if bad else set()
    return [f"[{letter(r, item)}]" if r.version in ends else letter(r, item) for r in releases]


def legend(releases: Sequence[Release], items: Sequence[Item]) -> str:
    """What the letters in use mean."""
    used = {letter(r, i) for r in releases for i in items}
    names = {mark: " or ".join(s for s, m in LETTERS.items() if m == mark) for mark in LETTERS.values()}
    names[CANNOT_TELL] = "cannot tell"
    return ", ".join(f"{mark} {name}" for mark, name in names.items() if mark in used) + "; [ ] first and last bad"


def untold(releases: Sequence[Release]) -> list[str]:
    """Why a release, or cases of it, cannot be told, once each."""
    found = []
    for release in releases:
        found += [f"{release.version} cannot be told: {release.reason}"] if release.reason else []
        said = {v.reason: v.status for v in release.verdicts.values() if v.status in TELLS_NOTHING}
        found += [f"{release.version}: {status}: {reason}" for reason, status in sorted(said.items())]
    return found


def markdown(package: str, releases: Sequence[Release], items: Sequence[Item]) -> str:
    """The table to paste into an issue."""
    rows = [f"| backend | case | {' | '.join(r.version for r in releases)} | bad |", f"|---|---|{'---|' * len(releases)}---|"]
    for item in items:
        bad = "; ".join(map(str, spans(releases, item)))
        rows.append(f"| {item.subject} | `{item.case_id}` | {' | '.join(cells(releases, item))} | {bad} |")
    reasons = [f"* {line}" for line in untold(releases)]
    return "\n".join([f"**{package}**", "", *rows, "", legend(releases, items), *(["", *reasons] if reasons else [])]) + "\n"


def as_json(package: str, releases: Sequence[Release], items: Sequence[Item]) -> dict[str, Any]:
    """Plain data: every status, and the bad spans."""
    rows = []
    for item in items:
        said = {r.version: str(v.status) if (v := r.verdicts.get(item)) else CANNOT_TELL for r in releases}
        rows.append({**asdict(item), "statuses": said, "bad": [asdict(s) for s in spans(releases, item)]})
    unknown = {r.version: r.reason for r in releases if r.reason}
    return {"package": package, "versions": [r.version for r in releases], "cases": rows, "cannot_tell": unknown}
