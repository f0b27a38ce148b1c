"""`moecheck known`: the known issues, until when each excuses, and where it last matched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from typing import Annotated, Any

import typer
from rich.console import Console

from harness import config
from harness.cli_history import AsJson, Now, cache, finished, moment
from harness.history.answers import Matched
from harness.history.query import History
from harness.known import KnownIssue
from harness.reading import printable

CLEAN, RED = 0, 1  # exit codes
SCHEMA = 1
out = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Entry:
    """A known issue and what the history says of it, None without a history or a word in it."""

    issue: KnownIssue
    matched: Matched | None

    @property
    def red(self) -> str:
        """Why its entry must be looked at; "" if it need not."""
        if self.issue.expired:
            return f"EXPIRED on {self.issue.expires}: look at {self.issue.link}, then mend the date or delete the entry"
        if self.matched is not None and self.matched.gone:
            return f"GONE: {self.matched.gone} of its cases passed in {self.matched.judged}; delete the entry"
        return ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        issue = {**vars(self.issue), "match": dict(self.issue.match), "expires": str(self.issue.expires or "")}
        return {**issue, "history": None if self.matched is None else asdict(self.matched), "red": self.red}


def command(
    history: Annotated[
        str | None, typer.Argument(metavar="[DIR|URL]", help="A run folder, a folder of them, or a URL.")
    ] = None,
    expired: Annotated[bool, typer.Option("--expired", help="Only entries whose date is over.")] = False,
    now: Now = None,
    as_json: AsJson = False,
) -> None:
    """Known issues, their dates and, given runs, where each last matched; exit code 1 for one that expired or is gone."""
    today = moment(now).date()
    issues, said, left_out = config.known_issues(today=today), None, []
    if history is not None:
        with cache() as folder, History(history, folder) as asked:
            said, left_out = asked.known(), asked.left_out
    entries = [Entry(issue, (said or {}).get(issue.id)) for issue in issues if issue.expired or not expired]
    if as_json:
        out.print(json.dumps({"schema": SCHEMA, "issues": [e.to_json() for e in entries]}, indent=1), markup=False)
    else:
        for entry in entries:
            for line in _lines(entry, today, said is not None):
                out.print(printable(line), markup=False)
        out.print(
            f"{len(entries)} known issues{' whose date is over' if expired else ''}, {sum(bool(e.red) for e in entries)} red"
        )
    raise typer.Exit(finished(left_out, RED if any(e.red for e in entries) else CLEAN))


def _lines(entry: Entry, today: date, asked: bool) -> Iterator[str]:
    issue, matched = entry.issue, entry.matched
    axes = ", ".join(f"{axis} {' '.join(map(str, values))}" for axis, values in issue.match.items())
    yield f"{issue.id}: {issue.status} of {issue.backend} on {issue.arch}, {axes}"
    yield f"  {issue.link}; {_until(issue, today)}"
    if matched is not None and matched.matched:
        yield f"  last failed as described in {matched.matched} ({matched.matched_started[:16]}), {matched.cases} cases"
    if matched is not None and matched.held:
        yield f"  last held back in {matched.held}"
    if asked and (matched is None or not (matched.matched or matched.held)):
        yield "  these runs have not seen it"
    if entry.red:
        yield f"  {entry.red}"


def _until(issue: KnownIssue, today: date) -> str:
    what = "not launched" if issue.quarantine else "excused"
    if issue.expires is None:
        return f"{what} without a date"
    return f"{what} until {issue.expires}" + ("" if issue.expired else f", {(issue.expires - today).days} days more")
