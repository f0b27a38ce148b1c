"""`moecheck preflight flashinfer-python==X`: would this release break us? Contracts, dependencies, our adapters; no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console

from harness import plan
from harness.backends import discover
from harness.backends.base import Backend
from harness.case import Case
from harness.cli_options import Backends, Index, Plugins, Wheelhouse, absolute
from harness.device import version as installed_version
from harness.errors import MoecheckError, OverlayError, SelectionError
from harness.plan import Request
from harness.session import device_of
from harness.versions import store
from harness.versions.contracts import Contract
from harness.versions.diff import Effect, diff
from harness.versions.env import Source, cache_folder, resolve
from harness.versions.preflight import preflight
from harness.versions.uv import PYPI

CLEAN, BROKEN = 0, 1
CASES = 1  # of each backend: its calls differ little between cases
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)


def command(  # noqa: PLR0913 - typer turns parameters into options
    requirement: Annotated[str, typer.Argument(metavar="PACKAGE==VERSION", help="The release you want.")],
    since: Annotated[str | None, typer.Option("--from", help="The release you have; default: the installed one.")] = None,
    backend: Backends = None,
    plugin: Plugins = None,
    resolving: Annotated[bool, typer.Option("--resolve/--no-resolve", help="Ask uv which other packages would move.")] = True,
    wheelhouse: Wheelhouse = None,
    index: Index = PYPI,
) -> None:
    """Would this release break us? Its contract against ours, what else would move, our adapters' calls against it."""
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
    if resolving:
        _resolved(package, wanted, Source(index, None if wheelhouse is None else wheelhouse.absolute()))
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


def _resolved(package: str, wanted: str, source: Source) -> None:
    """Print what uv would move with it. Without a network that is said, and the rest goes on."""
    try:
        found = resolve({package: wanted}, source, cache_folder())
    except OverlayError as error:
        out.print(f"which other packages move is not known: {error}", style="yellow", markup=False)
        return
    for name, (before, after) in sorted(found.moved.items()):
        down = name in found.downgrades
        text = f"moves {name} {before or 'none'} -> {after}{', a downgrade' if down else ''}"
        out.print(text, style="yellow" if down else None, markup=False)
    if not found.moved:
        out.print("moves nothing: it is what is installed")


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
