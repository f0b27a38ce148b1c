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

from harness.backends import discover
from harness.case import Case
from harness.cli_diff import written
from harness.cli_options import Platform, Plugins
from harness.errors import MoecheckError
from harness.plan import known_backend
from harness.reading import printable
from harness.select import Item
from harness.session import detected_platform
from harness.versions import env, judging
from harness.versions.attribute import Attribution, attribute
from harness.versions.bisect import Command, Journal, Question, Run
from harness.versions.search import EXACT, Answer, Model
from harness.versions.upgrade import AS_IT_WAS, ByCase, ByCommand, Overlays, Recorded, Trial, Upgrade, pins

FOUND, NO_ANSWER = 0, 2
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

Wheelhouse = Annotated[
    Path | None, typer.Option(help="Folder of wheels to take releases from; no index is asked.", exists=True, file_okay=False)
]
Index = Annotated[str, typer.Option(help="Index to take releases from.")]
Allow = Annotated[list[str] | None, typer.Option(help="Package that may be replaced although it is held; repeatable.")]


def command(  # noqa: PLR0913 - typer turns parameters into options
    before: Annotated[str, typer.Option("--from", help="What works: 'a==1,b==2'.")],
    after: Annotated[str, typer.Option("--to", help="What does not: 'a==3,b==4'.")],
    case: Annotated[str | None, typer.Option("--case", "-c", help="Case id that fails.")] = None,
    backend: Annotated[str | None, typer.Option("--backend", "-b", help="Backend that it fails on.")] = None,
    test: Annotated[
        str | None,
        typer.Option("--command", help="Your test, run over each overlay; {pins} is replaced. 0 good, 125 cannot tell."),
    ] = None,
    platform: Platform = None,
    plugin: Plugins = None,
    wheelhouse: Wheelhouse = None,
    index: Index = env.Source.index,
    allow: Allow = None,
    once: Annotated[bool, typer.Option("--once", help="The failure is known not to be flaky: run each set once.")] = False,
    journal: Annotated[Path | None, typer.Option(help="File that every run is written to, and resumed from.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds one run may take.", min=0.1)] = 600.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the answer and every run here.")] = None,
) -> None:
    """Which package, or which minimal set of them, breaks it: delta debugging over what an upgrade moves."""
    if (case is None) == (test is None) or (case is None) != (backend is None):
        raise MoecheckError("give either --case ID and --backend NAME, or --command CMD")
    upgrade = Upgrade(pins(before, "--from"), pins(after, "--to"))
    if not upgrade.changed:
        raise MoecheckError(f"--from {before} and --to {after} are the same versions; nothing moves")
    overlays = Overlays(upgrade, env.Source(index, wheelhouse, tuple(allow or ())), env.cache_folder())
    asked = test or f"{backend}:{case}"
    record = None if journal is None else Journal(journal, Question("-", before, after, asked, by="attribute"))
    try:
        seen = next((r.text for r in record.runs if r.answer is Answer.BAD), "") if record else ""
        if case is not None and backend is not None:
            terms = _terms(backend, platform, plugin, limit)
            trial: Trial = ByCase(overlays, Item(Case.parse(case).id, backend), terms, seen)
        else:
            trial = ByCommand(overlays, _command(asked, limit, seen), "{pins}" in asked)
        asking = Recorded(upgrade, trial, record, _watch)
        found = attribute(upgrade.changed, asking, EXACT if once else Model())
    finally:
        if record is not None:
            record.close()
    for line in told(upgrade, found):
        out.print(printable(line), markup=False)
    if json_file is not None:
        written(json_file, json.dumps(as_json(upgrade, found, asking.runs), indent=1) + "\n")
    raise typer.Exit(FOUND if found.causes else NO_ANSWER)


def _terms(backend: str, platform: str | None, plugin: list[str] | None, limit: float) -> judging.Terms:
    plugins = tuple(plugin or ())
    entries = known_backend(backend, discover(plugins)).entries
    return judging.Terms(platform or detected_platform(), plugins, limit, entries=entries)


def _command(text: str, limit: float, seen: str) -> Command:
    code = int(seen.removeprefix("exit ")) if seen else None
    return Command(shlex.split(text.replace("{pins}", "{version}")), limit, code)


def _watch(run: Run) -> None:
    err.print(f"{run.answer:11} {run.seconds:7.2f} s  {run.version}  {printable(run.text)[:160]}", markup=False)


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
