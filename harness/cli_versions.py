"""`moecheck contracts`: what a release of a library promises, and what changed between two."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from harness import journal
from harness.backends import discover
from harness.cli_options import Plugins
from harness.errors import MoecheckError, UnknownName
from harness.versions import observed, store
from harness.versions.contracts import Entry
from harness.versions.diff import Change, Effect, diff

CLEAN, BROKEN = 0, 1
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
    before, after = store.load(package, newest_or(package, old)), store.load(package, newest_or(package, new))
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
    contract = store.load(package, newest_or(package, version))
    known = {**{name: Entry("no entry, but ran", seen=forms) for name, forms in contract.seen.items()}, **contract.entries}
    names = [n for n in known if entry is None or n == entry or n.endswith(f".{entry}")]
    if not names:
        raise UnknownName("entry", entry or "", known)
    out.print(f"{package} {contract.version}  {contract.wheel}  sha256 {contract.sha256}", markup=False)
    for name in names:
        _describe(name, known[name])


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
        path = store.save(observed.kept(contract))
        out.print(f"{path}: {len(contract.entries)} entries of {contract.wheel}", markup=False)


@app.command()
def record(run: Annotated[Path, typer.Argument(help="Run folder, or a journal file.")]) -> None:
    """Add what entry points returned in a real run to the stored contracts of the releases that ran."""
    told = observed.record(journal.read_from(run))
    for line in told:
        out.print(line, markup=False)
    if not told:
        err.print(f"{run}: nothing new: no library with a stored contract returned anything that is not recorded", markup=False)


def newest_or(package: str, text: str) -> str:
    """The version, or the newest one stored for the text `newest`."""
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
