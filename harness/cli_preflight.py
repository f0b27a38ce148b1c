"""`moecheck preflight flashinfer-python==X`: would this release break us? Contracts, dependencies, our adapters; no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console

from harness import plan
from harness.backends import discover
from harness.backends.base import Backend
from harness.case import Case
from harness.cli_options import Backends, Plugins, absolute
from harness.device import version as installed_version
from harness.errors import MoecheckError, SelectionError
from harness.plan import Request
from harness.reading import printable
from harness.session import device_of
from harness.versions import store
from harness.versions.contracts import Contract
from harness.versions.diff import Effect, diff
from harness.versions.preflight import preflight

CLEAN, BROKEN = 0, 1
CASES = 1  # of each backend: its calls differ little between cases
RESOLVE_S = 300.0
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)


def command(
    requirement: Annotated[str, typer.Argument(metavar="PACKAGE==VERSION", help="The release you want.")],
    since: Annotated[str | None, typer.Option("--from", help="The release you have; default: the installed one.")] = None,
    backend: Backends = None,
    plugin: Plugins = None,
    resolve: Annotated[bool, typer.Option(help="Ask pip which other packages would move.")] = True,
) -> None:
    """Would this release break us? Its contract against ours, what else pip would move, our adapters' calls against it."""
    package, _, wanted = requirement.partition("==")
    if not wanted:
        raise MoecheckError(f"given {requirement!r}; wanted PACKAGE==VERSION, e.g. flashinfer-python==0.6.5")
    have = since or installed_version(package)
    if not have:
        raise MoecheckError(f"{package} is not installed; say with --from VERSION what you have")
    found = discover(absolute(plugin))
    backends = {b.name: b for b in plan.chosen(backend or (), found)}
    new = _contract(package, wanted, backends)
    broken = _compare(store.load(package, have), new, backends)
    if resolve:
        _resolved(requirement)
    subjects = list(_subjects(new, backends, tuple(absolute(plugin))))
    refusals = list(preflight(new, subjects))
    for refusal in refusals:
        out.print(f"breaks us  {refusal.backend} on {refusal.case}: {refusal.entry}: {refusal.text}", style="red", markup=False)
    adapters = len({backend.name for backend, _ in subjects})
    out.print(f"{adapters} adapters made the calls of {len(subjects)} cases: {len(refusals)} would not bind")
    raise typer.Exit(BROKEN if broken or refusals else CLEAN)


def _contract(package: str, wanted: str, backends: dict[str, Backend]) -> Contract:
    """The stored contract, or that of the wheel, fetched and not kept."""
    if any(store.parsed(v) == store.parsed(wanted) for v in store.releases(package)):
        return store.load(package, wanted)
    names = [name for backend in backends.values() for name in backend.entries]
    with store.downloaded(package, wanted) as wheel:
        return store.read(wheel, package, store.wanted(package, names))


def _compare(old: Contract, new: Contract, backends: dict[str, Backend]) -> bool:
    """Print what touches us; True if it breaks us."""
    changes = [
        change for change in diff(old, new, backends.values()) if change.backends and change.effect is not Effect.HARMLESS
    ]
    for change in changes:
        style = "red" if change.effect is Effect.BREAKS else "yellow"
        users = ", ".join(change.backends)
        out.print(f"{change.effect:9}  {change.entry}: {change.kind}: {change.text}  [{users}]", style=style, markup=False)
    breaking = sum(change.effect is Effect.BREAKS for change in changes)
    out.print(f"{old.package} {old.version} -> {new.version}: {breaking} changes break us, {len(changes) - breaking} to check")
    return breaking > 0


def _resolved(requirement: str) -> None:
    """Print what pip would install beside it."""
    options = ("--dry-run", "--quiet", "--no-input", "--report", "-")
    call = [sys.executable, "-m", "pip", "install", *options, requirement]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=RESOLVE_S, check=False)
        moved = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    except (subprocess.TimeoutExpired, ValueError, KeyError) as error:
        said = done.stderr.strip().splitlines() if not isinstance(error, subprocess.TimeoutExpired) else []
        raise MoecheckError(f"{requirement} does not resolve here: {printable(said[-1])[:300] if said else error}") from error
    for data in moved:
        before = installed_version(data["name"])
        down = bool(before) and store.parsed(before) > store.parsed(data["version"])
        text = f"moves {data['name']} {before or 'none'} -> {data['version']}{', a downgrade' if down else ''}"
        out.print(text, style="yellow" if down else None, markup=False)


def _subjects(contract: Contract, backends: dict[str, Backend], plugins: tuple[str, ...]) -> Iterator[tuple[Backend, Case]]:
    """The adapters of the package over their twins, each with a few cases of the smallest tier."""
    tops = {name.partition(".")[0] for name in contract.entries}
    ours = [n for n, b in backends.items() if n.endswith("_twin") and any(e.partition(".")[0] in tops for e in b.entries)]
    for name in ours:
        request = Request("cpu", "smoke", (name,), (), (), plugins, None)
        try:
            items = plan.make(request, backends, device_of("cpu")).items
        except SelectionError:
            err.print(f"{name}: the tier smoke has no case for it", markup=False)
            continue
        for item in items[:CASES]:
            yield backends[name], Case.parse(item.case_id)
