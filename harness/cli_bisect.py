"""`moecheck bisect`: since when, by a contract, by a case judged over each version's overlay, or by a command of the user's."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harness import cli_versions, config, plan
from harness.backends import discover
from harness.case import Case
from harness.cli_options import Allow, Index, Platform, Plugins, Wheelhouse
from harness.errors import MoecheckError
from harness.reading import printable
from harness.select import Item
from harness.session import detected_platform, device_of
from harness.versions import axes, env, store
from harness.versions.bisect import Command, Contracts, Journal, Outcome, Question, Result, Run, between, bisect
from harness.versions.cases import Judged
from harness.versions.env import Source, Terms
from harness.versions.git import Commits
from harness.versions.properties import split
from harness.versions.report import changed_files, report
from harness.versions.search import READ, Answer, Model, Next, Stopped
from harness.versions.uv import PYPI

CLEAN, NO_ANSWER = 0, 2
AS_IT_IS = (
    "each commit was used as it is checked out; a package that must be built, or lies deeper than the root or src, needs"
    " --build CMD, run in the checkout, where {target} is the folder to fill (pip install --no-deps --target {target} .)"
)
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

VERSION = "{version}"  # in a command of the user's


@dataclass(frozen=True)
class Asked:
    """The command line, less the question: which versions there are and how one is tried."""

    axis: axes.Axis | None
    item: Item | None
    terms: Terms
    options: str
    environment: dict[str, str] = field(default_factory=dict)

    def span(self, question: Question) -> tuple[str, ...]:
        """Every version between the ends."""
        ends = (question.bad, question.good) if question.fix else (question.good, question.bad)
        return self.axis.span(*ends) if self.axis is not None else between(store.releases(question.package), *ends)


def command(  # noqa: PLR0913 - typer turns parameters into options
    package: cli_versions.Package,
    good: Annotated[str, typer.Option(help="A version that is good.")],
    bad: Annotated[str, typer.Option(help="A version that is bad; `newest` for the newest known.")],
    contract: Annotated[
        str | None, typer.Option(help="ENTRY[:property] whose change is searched: returns, position.NAME, value.MEMBER, ...")
    ] = None,
    command: Annotated[
        str | None, typer.Option(help="Your test: {version} is replaced; exit 0 good, 125 cannot tell, else bad.")
    ] = None,
    case: Annotated[str | None, typer.Option("--case", "-c", help="Case id, judged over each version.")] = None,
    backend: Annotated[str | None, typer.Option("--backend", "-b", help="Backend that --case is judged on.")] = None,
    platform: Platform = None,
    plugin: Plugins = None,
    axis: Annotated[str | None, typer.Option(help="What a version is: release, wheelhouse or git (a commit).")] = None,
    wheelhouse: Wheelhouse = None,
    index: Index = PYPI,
    repo: Annotated[str | None, typer.Option(help="For --axis git: folder or URL; it is only read.")] = None,
    build: Annotated[str, typer.Option(help="For --axis git: shell command in the checkout; {target}: folder to fill.")] = "",
    allow: Allow = None,
    find_fix: Annotated[bool, typer.Option("--find-fix", help="Also, or with --bad older than --good only: fixed in.")] = False,
    journal: Annotated[Path | None, typer.Option(help="File that every run is written to, and resumed from.")] = None,
    files: Annotated[bool, typer.Option("--files", help="Download the two neighbours and list the files that differ.")] = False,
    limit: Annotated[float, typer.Option(help="Seconds one run may take.", min=0.1, max=config.MAX_LIMIT_S)] = 600.0,
) -> None:
    """Which version changed it: the contract of an entry point, the verdict on a case, or what a command of yours finds."""
    if sum(x is not None for x in (contract, command, case)) != 1:
        raise MoecheckError("give either --contract ENTRY[:property], --case ID --backend B, or --command CMD")
    source = Source(index, None if wheelhouse is None else wheelhouse.absolute(), tuple(allow or ()))
    if command is not None and axis is None and wheelhouse is None and VERSION not in command:
        told = f"write {VERSION} where the version belongs, or say with --axis release that it is to run over the overlays"
        raise MoecheckError(f"--command {command!r} does the same for every version: {told}")
    item, terms = subject(case, backend, platform, tuple(plugin or ()), limit)
    chosen = None
    if case is not None or axis is not None or wheelhouse is not None:
        if contract is not None:
            raise MoecheckError("--contract reads the stored contracts; it goes with no --axis and no --wheelhouse")
        chosen = axes.named(axis or "release", package, source, lambda: _commits(repo, package, build), _tell)
    asked = Asked(chosen, item, terms, _options(terms, axis, source, repo, build))
    wanted = contract or command or f"{backend} on {case}"
    by = "contract" if contract else "command" if command else "case"
    results = [
        _ask(q, asked, journal, limit) for q in _questions(Question(package, good, bad, wanted, find_fix, by), axis, chosen)
    ]
    for result in results:
        neighbours = _files(result, chosen) if files and result.first else ()
        out.print("\n" + report(result, _rerun(result, asked), neighbours, _told(result, asked)), markup=False)
        if isinstance(result.answer, Stopped) and axis == "git" and not build:
            _tell(AS_IT_IS)
    raise typer.Exit(NO_ANSWER if any(isinstance(r.answer, Stopped) for r in results) else CLEAN)


def _questions(given: Question, axis: str | None, chosen: axes.Axis | None) -> list[Question]:
    """The introduction, the fix, or both."""
    end: Callable[[str], str] = chosen.end if chosen else lambda text: cli_versions.newest_or(given.package, text)
    older: Callable[[str, str], bool] = chosen.older if chosen else lambda a, b: store.parsed(a) < store.parsed(b)
    good, bad, newest = end(given.good), end(given.bad), end("newest")
    kind = "git" if axis == "git" else "release"

    def question(first: str, fix: bool) -> Question:
        return Question(given.package, first, bad, given.wanted, fix, given.by, kind)

    if given.fix and older(bad, good):
        return [question(good, True)]
    return [question(good, False), *([question(newest, True)] if given.fix and newest != bad else [])]


def subject(
    case: str | None, backend: str | None, platform: str | None, plugins: tuple[str, ...], limit: float
) -> tuple[Item | None, Terms]:
    """What is judged, and how; MoecheckError before any version is touched."""
    if case is None:
        return None, Terms("")
    if backend is None:
        raise MoecheckError("--case needs --backend: the subject whose package changes")
    where = platform or detected_platform()
    known = plan.known_backend(backend, discover(plugins))
    refusal = known.supports(Case.parse(case), device_of(where))
    if not refusal.ok:
        raise MoecheckError(f"{backend} does not take this case on {where}: {refusal.reason}")
    terms = Terms(where, plugins, limit, repeats=config.tier("nightly").repeats, entries=known.entries)
    return Item(Case.parse(case).id, backend), terms


def _commits(repo: str | None, package: str, build: str) -> Commits:
    if repo is None:
        raise MoecheckError("--axis git: say with --repo URL or DIR whose commits")
    commits = Commits(repo, package, build, env.cache_folder())
    if commits.stale:
        _tell(f"--repo {repo} cannot be read now, what was known of it the last time is taken: {commits.stale}")
    return commits


def _ask(question: Question, asked: Asked, path: Path | None, limit: float) -> Result:
    """One bisect, told while it goes on."""
    span = asked.span(question)
    if path is not None and question.fix:
        path = path.with_name(f"{path.stem}.fix{path.suffix}")
    record = None if path is None else Journal(path, question)
    try:
        if question.by == "contract":
            contracts = Contracts(question.package, *split(question.wanted))
            return bisect(question, contracts.ends(span, question.fix), contracts, record, _watch, READ)
        return bisect(question, span, _attempt(question, asked, record, limit), record, _watch, Model())
    finally:
        if record is not None:
            record.close()


def _attempt(question: Question, asked: Asked, record: Journal | None, limit: float) -> Callable[[str], Outcome]:
    """What is done with one version. The failure that counts is that of the first bad run, the journal's if it has one."""
    seen = next((r.text for r in record.runs if r.answer is Answer.BAD), None) if record else None
    overlay = None if asked.axis is None else asked.axis.overlay
    if asked.item is None:
        return Command(shlex.split(question.wanted), limit, int(seen.removeprefix("exit ")) if seen else None, overlay)
    assert overlay is not None
    judged = Judged(question.package, overlay, asked.item, asked.terms, seen)
    judged.environment = asked.environment
    return judged


def _watch(run: Run, test: Next) -> None:
    text = printable(run.text)[:120]
    err.print(f"{run.version[:14]:14} {run.answer:11} {run.seconds:7.2f} s  {test.information:.2f} bit  {text}", markup=False)


def _tell(text: str) -> None:
    err.print(f"moecheck: {text}", style="yellow", markup=False)


def _files(result: Result, axis: axes.Axis | None) -> Sequence[str]:
    package, before, first = result.question.package, str(result.before), str(result.first)
    if axis is not None and (changed := axis.changed(before, first)) is not None:
        return changed
    with store.downloaded(package, before) as old, store.downloaded(package, first) as new:
        return changed_files(old, new)


def _told(result: Result, asked: Asked) -> dict[str, str]:
    """When the neighbours came, and where the last run was."""
    if asked.axis is None:
        return {}
    told = {version: asked.axis.told(version) for version in (result.before, result.first) if version is not None}
    facts = ", ".join(f"{name} {value}" for name, value in asked.environment.items())
    return {**told, "environment": facts or "-"}


def _rerun(result: Result, asked: Asked) -> str:
    q = result.question
    fix = " --find-fix" if q.fix else ""
    wanted = f"--{q.by} {shlex.quote(q.wanted)}"
    if asked.item is not None:
        wanted = f"--case {asked.item.case_id} --backend {asked.item.subject}"
    return f"moecheck bisect {q.package} --good {q.good} --bad {q.bad} {wanted}{asked.options}{fix}"


def _options(terms: Terms, axis: str | None, source: Source, repo: str | None, build: str) -> str:
    """Those that the report repeats."""
    words = [("--platform", terms.platform)] * bool(terms.platform) + [("--plugin", p) for p in terms.plugins]
    words += [("--axis", axis or "")] * (axis is not None) + [("--repo", repo or "")] * (repo is not None)
    words += [("--build", build)] * bool(build) + [("--index", source.index)] * (source.index != PYPI)
    words += [("--wheelhouse", str(source.wheelhouse))] * (source.wheelhouse is not None)
    words += [("--allow", name) for name in source.allow]
    return "".join(f" {name} {shlex.quote(value)}" for name, value in words)
