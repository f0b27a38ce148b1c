"""`moecheck attribute`: which package of an upgrade breaks a case or a command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from harness import config
from harness.cli_bisect import subject
from harness.cli_diff import written
from harness.cli_options import Allow, Index, Platform, Plugins, Wheelhouse
from harness.errors import MoecheckError
from harness.reading import printable
from harness.versions import env
from harness.versions.attribute import Attribution, attribute
from harness.versions.bisect import Command, Journal, Question, Run, Try
from harness.versions.cases import Judged
from harness.versions.search import EXACT, Answer, Model
from harness.versions.upgrade import AS_IT_WAS, Overlays, Recorded, Upgrade, pins
from harness.versions.uv import PYPI

FOUND, NO_ANSWER = 0, 2
OWN = "{pins}"  # in a command that makes its own environment
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)


def command(  # noqa: PLR0913 - typer turns parameters into options
    before: Annotated[str, typer.Option("--from", help="What works: 'a==1,b==2'.")],
    after: Annotated[str, typer.Option("--to", help="What does not: 'a==3,b==4'.")],
    case: Annotated[str | None, typer.Option("--case", "-c", help="Case id, judged over each set.")] = None,
    backend: Annotated[str | None, typer.Option("--backend", "-b", help="Backend that --case is judged on.")] = None,
    test: Annotated[
        str | None,
        typer.Option("--command", help="Your test, run over the overlay of each set: exit 0 good, 125 cannot tell, else bad."),
    ] = None,
    platform: Platform = None,
    plugin: Plugins = None,
    wheelhouse: Wheelhouse = None,
    index: Index = PYPI,
    allow: Allow = None,
    once: Annotated[bool, typer.Option("--once", help="The failure is known not to be flaky: run each set once.")] = False,
    journal: Annotated[Path | None, typer.Option(help="File that every run is written to, and resumed from.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds one run may take.", min=0.1, max=config.MAX_LIMIT_S)] = 600.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the answer and every run here.")] = None,
) -> None:
    """Which package, or which minimal set of them, breaks it: delta debugging over what an upgrade moves."""
    if (case is None) == (test is None):
        raise MoecheckError("give either --case ID and --backend NAME, or --command CMD")
    upgrade = Upgrade(pins(before, "--from"), pins(after, "--to"))
    if not upgrade.changed:
        raise MoecheckError(f"--from {before} and --to {after} are the same versions; nothing moves")
    item, terms = subject(case, backend, platform, tuple(plugin or ()), limit)
    overlays = Overlays(env.Source(index, wheelhouse and wheelhouse.absolute(), tuple(allow or ())), env.cache_folder())
    asked = test or f"{backend} on {case}"
    record = None if journal is None else Journal(journal, Question("-", before, after, asked, by="attribute"))
    try:
        seen = next((r.text for r in record.runs if r.answer is Answer.BAD), None) if record else None
        attempt: Try = _command(asked, limit, seen, overlays)
        if item is not None:
            attempt = Judged("-", overlays, item, terms, seen)
        asking = Recorded(upgrade, attempt, record, _watch)
        found = attribute(upgrade.changed, asking, EXACT if once else Model())
    finally:
        if record is not None:
            record.close()
    for line in told(upgrade, found):
        out.print(printable(line), markup=False)
    if json_file is not None:
        written(json_file, json.dumps(as_json(upgrade, found, asking.runs), indent=1) + "\n")
    raise typer.Exit(FOUND if found.causes else NO_ANSWER)


def _command(text: str, limit: float, seen: str | None, overlays: Overlays) -> Command:
    """One that names {pins} makes its own environment."""
    words = shlex.split(text.replace(OWN, "{version}"))
    code = int(seen.removeprefix("exit ")) if seen and seen.startswith("exit ") else None
    return Command(words, limit, code, None if OWN in text else overlays)


def _watch(label: str, run: Run) -> None:
    err.print(f"{run.answer:11} {run.seconds:7.2f} s  {label}  {printable(run.text)[:160]}", markup=False)


def told(upgrade: Upgrade, found: Attribution) -> Iterator[str]:
    """The answer in words, then every set that was asked."""
    for cause in found.causes:
        together = len(cause.packages) > 1 and not cause.suspects
        yield f"{upgrade.label(cause.packages)} breaks it{', and only together' if together else ''}"
        if cause.suspects:
            rest = f"; {upgrade.label(cause.needed)} is needed" if cause.needed else ""
            yield f"  suspects, of which nothing could be told alone: {upgrade.label(cause.suspects)}{rest}"
    if found.stopped:
        yield f"no answer: {found.stopped}"
    elif found.rest is not Answer.BAD:
        others = (
            "nothing else moves" if not _others(upgrade, found) else f"{_others(upgrade, found)} without that: {found.rest}"
        )
        yield others
    yield f"{sum(a.fails + a.passes for a in found.asked)} runs of {len(found.asked)} sets:"
    for asked in found.asked:
        yield f"  {asked.answer:11} {asked.fails} failed, {asked.passes} passed  {upgrade.label(asked.packages)}"


def _others(upgrade: Upgrade, found: Attribution) -> str:
    blamed = frozenset[str]().union(*(c.packages for c in found.causes))
    label = upgrade.label(frozenset(upgrade.changed) - blamed)
    return "" if label == AS_IT_WAS else label


def as_json(upgrade: Upgrade, found: Attribution, runs: list[Run]) -> dict[str, Any]:
    """Plain data."""
    causes = [{name: sorted(getattr(c, name)) for name in ("packages", "needed", "suspects")} for c in found.causes]
    asked = [{**asdict(a), "packages": sorted(a.packages)} for a in found.asked]
    return {
        "from": dict(upgrade.old),
        "to": dict(upgrade.new),
        "causes": causes,
        "rest": found.rest,
        "stopped": found.stopped,
        "asked": asked,
        "runs": [asdict(r) for r in runs],
    }
