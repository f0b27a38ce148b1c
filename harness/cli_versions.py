"""`moecheck contracts`: what a release of a library promises, and what changed between two; `moecheck bisect`: since when."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from harness import journal
from harness.backends import discover
from harness.cli_options import Plugins
from harness.errors import MoecheckError, UnknownName
from harness.reading import printable
from harness.versions import observed, store
from harness.versions.bisect import Command, Contracts, Journal, Question, Result, Run, between
from harness.versions.bisect import bisect as search
from harness.versions.contracts import Entry
from harness.versions.diff import Change, Effect, diff
from harness.versions.properties import split
from harness.versions.report import changed_files, report
from harness.versions.search import EXACT, Answer, Model, Next, Stopped

CLEAN, BROKEN, NO_ANSWER = 0, 1, 2
COLOURS = {Effect.BREAKS: "red", Effect.CHECK: "yellow", Effect.HARMLESS: "dim"}

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="What releases of a library promise, read from their wheels."
)
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

Package = Annotated[str, typer.Argument(help="Package as the index names it: flashinfer-python, vllm.")]


@app.command("diff")
def diff_(
    package: Package,
    old: Annotated[str, typer.Argument(help="Version you have.")],
    new: Annotated[str, typer.Argument(help="Version you want; `newest` for the newest stored.")],
    plugin: Plugins = None,
    everything: Annotated[bool, typer.Option("--all", help="Also what touches none of our backends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per change.")] = False,
) -> None:
    """What changed for callers from OLD to NEW; exit code 1 when it breaks one of our backends."""
    before, after = store.load(package, _version(package, old)), store.load(package, _version(package, new))
    changes = diff(before, after, discover(plugin or ()).values())
    shown = changes if everything or as_json else [c for c in changes if c.backends]
    for change in shown:
        _tell(change, as_json)
    counts = Counter(change.effect for change in changes)
    said = ", ".join(f"{counts[effect]} {effect}" for effect in Effect)
    hidden = len(changes) - len(shown)
    rest = f"; {hidden} touch none of our backends (--all shows them)" if hidden else ""
    err.print(f"{package} {before.version} -> {after.version}: {len(changes)} changes: {said}{rest}", markup=False)
    raise typer.Exit(BROKEN if counts[Effect.BREAKS] else CLEAN)


@app.command()
def show(
    package: Package,
    version: Annotated[str, typer.Argument(help="Version; `newest` for the newest stored.")],
    entry: Annotated[str | None, typer.Argument(help="Entry point, or the end of its name; default: all.")] = None,
) -> None:
    """What one release promises: signatures, what is returned, arch gates, enum values."""
    contract = store.load(package, _version(package, version))
    names = [n for n in contract.entries if entry is None or n == entry or n.endswith(f".{entry}")]
    if not names:
        raise UnknownName("entry", entry or "", contract.entries)
    out.print(f"{package} {contract.version}  {contract.wheel}  sha256 {contract.sha256}", markup=False)
    for name in names:
        _describe(name, contract.entries[name])


@app.command("list")
def list_(package: Package) -> None:
    """The releases whose contracts are stored, oldest first."""
    for version in store.releases(package):
        out.print(version, markup=False)


@app.command()
def extract(
    package: Package,
    versions: Annotated[list[str], typer.Argument(metavar="VERSION|WHEEL...", help="Releases to download, or wheel files.")],
    plugin: Plugins = None,
) -> None:
    """Read the contract of releases from their wheels and store it; nothing is imported or installed."""
    calls = [name for backend in discover(plugin or ()).values() for name in backend.entries]
    want = store.wanted(package, calls)
    for version in versions:
        if version.endswith(".whl"):
            contract = store.read(Path(version), package, want)
        else:
            with store.downloaded(package, version) as wheel:
                contract = store.read(wheel, package, want)
        path = store.save(contract)
        out.print(f"{path}: {len(contract.entries)} entries of {contract.wheel}", markup=False)


@app.command()
def record(run: Annotated[Path, typer.Argument(help="Run folder, or a journal file.")]) -> None:
    """Add what entry points returned in a real run to the stored contracts of the releases that ran."""
    told = observed.record(journal.read_from(run))
    for line in told:
        out.print(line, markup=False)
    if not told:
        err.print(f"{run}: nothing new: no library with a stored contract returned anything that is not recorded", markup=False)


def bisect(  # noqa: PLR0913 - typer turns parameters into options
    package: Package,
    good: Annotated[str, typer.Option(help="A release that is good.")],
    bad: Annotated[str, typer.Option(help="A release that is bad; `newest` for the newest stored.")],
    contract: Annotated[
        str | None, typer.Option(help="ENTRY[:property] whose change is searched: returns, position.NAME, value.MEMBER, ...")
    ] = None,
    command: Annotated[
        str | None, typer.Option(help="Your test: {version} is replaced; exit 0 good, 125 cannot tell, else bad.")
    ] = None,
    find_fix: Annotated[bool, typer.Option("--find-fix", help="Also, or with --bad older than --good only: fixed in.")] = False,
    journal: Annotated[Path | None, typer.Option(help="File that every run is written to, and resumed from.")] = None,
    files: Annotated[bool, typer.Option("--files", help="Download the two neighbours and list the files that differ.")] = False,
    limit: Annotated[float, typer.Option(help="Seconds one run of --command may take.", min=0.1)] = 600.0,
) -> None:
    """Which release changed it: the contract of an entry point, or what a command of yours finds, flaky or not."""
    if (contract is None) == (command is None):
        raise MoecheckError("give either --contract ENTRY[:property] or --command CMD")
    newest = _version(package, "newest")
    good, bad = (newest if end == "newest" else end for end in (good, bad))
    fixed_only = find_fix and store.parsed(bad) < store.parsed(good)
    asked, by = contract or command or "", "contract" if contract else "command"
    questions = [Question(package, good, bad, asked, fixed_only, by)]
    if find_fix and not fixed_only:
        questions.append(Question(package, newest, bad, asked, True, by))
    results = [_ask(q, journal, limit) for q in questions if q.good != q.bad]
    for result in results:
        neighbours = _files(result) if files and result.first else ()
        out.print("\n" + report(result, _rerun(result), neighbours), markup=False)
    raise typer.Exit(NO_ANSWER if any(isinstance(r.answer, Stopped) for r in results) else CLEAN)


def _ask(question: Question, path: Path | None, limit: float) -> Result:
    """One bisect, told while it goes on."""
    known = store.releases(question.package)
    span = between(known, *((question.bad, question.good) if question.fix else (question.good, question.bad)))
    if path is not None and question.fix:
        path = path.with_name(f"{path.stem}.fix{path.suffix}")
    record = None if path is None else Journal(path, question)
    try:
        attempt: Contracts | Command
        if question.by == "contract":
            attempt = Contracts(question.package, *split(question.wanted))
            attempt.ends(span, question.fix)
        else:
            seen = next((r.text for r in record.runs if r.answer is Answer.BAD), "") if record else ""
            attempt = Command(shlex.split(question.wanted), limit, int(seen.removeprefix("exit ")) if seen else None)
        return search(question, known, attempt, record, _watch, EXACT if question.by == "contract" else Model())
    finally:
        if record is not None:
            record.close()


def _watch(run: Run, test: Next) -> None:
    err.print(f"{run.version:14} {run.answer:11} {run.seconds:7.2f} s  {test.information:.2f} bit  {printable(run.text)[:120]}")


def _files(result: Result) -> Sequence[str]:
    package = result.question.package
    with store.downloaded(package, str(result.before)) as old, store.downloaded(package, str(result.first)) as new:
        return changed_files(old, new)


def _rerun(result: Result) -> str:
    q = result.question
    fix = " --find-fix" if q.fix else ""
    return f"moecheck bisect {q.package} --good {q.good} --bad {q.bad} --{q.by} {shlex.quote(q.wanted)}{fix}"


def _version(package: str, text: str) -> str:
    if text != "newest":
        return text
    stored = store.releases(package)
    if not stored:
        raise MoecheckError(f"{package}: no contract is stored; moecheck contracts extract {package} VERSION")
    return stored[-1]


def _tell(change: Change, as_json: bool) -> None:
    if as_json:
        data: dict[str, Any] = {**vars(change), "effect": change.effect}
        out.print(json.dumps(data), markup=False)
        return
    users = f"  [{', '.join(change.backends)}]" if change.backends else ""
    text = f"{change.effect:9}  {change.entry}: {change.kind}: {change.text}{users}"
    out.print(text, style=COLOURS[change.effect], markup=False)


def _describe(name: str, entry: Entry) -> None:
    out.print(f"\n{name}  ({entry.at})", markup=False, style="bold")
    for parameter in entry.parameters:
        star = {"positional": "", "keyword": "(keyword) "}.get(parameter.kind, parameter.kind)
        default = "" if parameter.default is None else f" = {parameter.default}"
        out.print(f"  {star}{parameter.name}: {parameter.annotation or '-'}{default}", markup=False)
    if entry.returns:
        out.print(f"  returns {' or '.join(entry.returns)}; annotated {entry.annotation or 'nothing'}", markup=False)
    if entry.seen:
        out.print(f"  returned in real runs: {' or '.join(entry.seen)}", markup=False)
    for backend, allowed in entry.archs.items():
        out.print(f"  {backend or 'all backends'}: SM {', '.join(map(str, allowed))}", markup=False)
    for member, value in entry.values.items():
        out.print(f"  {member} = {value}", markup=False)
    for check in entry.checks:
        out.print(f"  checks: {check}", markup=False)
    if entry.body:
        out.print(f"  body {entry.body}", markup=False)
