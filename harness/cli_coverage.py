"""`moecheck coverage`: which cells have ever really run, and whether those that somebody depends on still do."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness import config
from harness.backends import discover
from harness.backends.base import Backend
from harness.case import Case
from harness.cli_history import AsJson, Now, cache, finished, moment, since
from harness.cli_options import Plugins
from harness.executed import Reach, Ways
from harness.history.ledger import Cell, State, ledger, promises
from harness.history.query import History
from harness.history.require import Missing, load, missing
from harness.plan import Request
from harness.plan import grid as grid_of
from harness.reading import printable
from harness.run import STRENGTHS

CLEAN, NOT_RUN = 0, 1  # exit codes
SCHEMA = 1
WINDOW_DAYS = 30.0
out = Console(soft_wrap=True, highlight=False)

Reached = dict[str, dict[str, list[Ways]]]


def command(  # noqa: PLR0913 - typer turns parameters into options
    history: Annotated[str, typer.Argument(metavar="DIR|URL", help="A run folder, a folder of them, or a URL of fsspec.")],
    require: Annotated[Path | None, typer.Option(help="YAML of cells that must have run, e.g. configs/coverage.yaml.")] = None,
    platform: Annotated[list[str] | None, typer.Option(help="Only this platform, in full; repeatable.")] = None,
    days: Annotated[float, typer.Option(help="Window of the combinations executed, in days.", min=0.001)] = WINDOW_DAYS,
    tier: Annotated[str | None, typer.Option(help="Tier whose combinations count; default: the newest run's.")] = None,
    now: Now = None,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Every backend, recipe, format and arch: when it last really ran. Exit code 1 where one that --require names did not."""
    at, backends = moment(now), discover(plugin or ())
    promised = promises([config.platform(name) for name in config.names("platforms")], backends)
    wanted = None if require is None else load(require, backends, promised)
    for name in platform or ():
        config.platform(name)
    with cache() as folder, History(history, folder) as asked:
        cells, seen = ledger(asked.facts(), promised, at), {run.platform: run.tier for run in asked.runs()}
        reached = _reached(asked.executed(since(days, at.isoformat())), seen, tier, backends)
    late = [] if wanted is None else missing(wanted, cells, promised)
    shown = [cell for cell in cells if not platform or cell.arch in platform]
    if as_json:
        _json(shown, reached, late, asked.left_out)
    else:
        _show(shown, reached, set(platform or ()))
        for one in late:
            out.print(printable(f"REQUIRED {one}"), markup=False, style="red")
    if wanted is not None and not as_json:
        out.print(f"{len(late)} required cells have not really run in time" if late else "all required cells ran in time")
    raise typer.Exit(finished(asked.left_out, NOT_RUN if late else CLEAN))


def _reached(
    executed: dict[tuple[str, str], list[str]], tiers: dict[str, str], tier: str | None, backends: dict[str, Backend]
) -> Reached:
    """Platform -> backend -> the combinations of the tier's grid that were executed."""
    found: Reached = defaultdict(dict)
    for (platform, subject), case_ids in executed.items():
        named = tier or tiers.get(platform) or "smoke"
        if platform not in config.names("platforms") or subject not in backends or named not in config.names("tiers"):
            continue
        if grid := grid_of(Request(platform, named), backends[subject]):
            cases, reach = [Case.parse(case_id) for case_id in case_ids], Reach(grid)
            found[platform][subject] = [reach.ways(cases, strength) for strength in STRENGTHS]
    return found


def _json(cells: list[Cell], reached: Reached, late: list[Missing], left_out: list[str]) -> None:
    ways = {p: {name: [asdict(w) for w in found] for name, found in of.items()} for p, of in reached.items()}
    data: dict[str, Any] = {"schema": SCHEMA, "cells": [cell.to_json() for cell in cells], "executed": ways}
    out.print(json.dumps({**data, "missing": [one.to_json() for one in late], "left_out": left_out}, indent=1), markup=False)


def _show(cells: list[Cell], reached: Reached, in_full: set[str]) -> None:
    for arch in sorted({cell.arch for cell in cells}):
        mine = [cell for cell in cells if cell.arch == arch]
        by_state = {state: [cell for cell in mine if cell.state is state] for state in State}
        counts = ", ".join(f"{len(found)} {state}" for state, found in by_state.items() if found)
        out.print(f"{arch}: {len(mine)} cells: {counts}", markup=False, style="bold")
        if not any(cell.asked for cell in mine) and arch not in in_full:
            out.print(f"  no run on it; moecheck coverage DIR --platform {arch} lists the cells", markup=False)
            continue
        if by_state[State.EXECUTED]:
            width = shutil.get_terminal_size((140, 40)).columns
            Console(width=width, highlight=False, file=out.file).print(_table(by_state[State.EXECUTED]))
        for line in (*_stopped(mine), *_skipped(by_state[State.SKIPPED]), *_unplanned(by_state[State.UNPLANNED])):
            out.print(printable(line), markup=False)
        if found := reached.get(arch):
            width = max(map(len, found))
            out.print("Combinations of axis values executed in the window, of those that are possible:", markup=False)
            for name, ways in found.items():
                out.print(f"  {name:<{width}}  {', '.join(map(str, ways))}", markup=False)


def _table(cells: list[Cell]) -> Table:
    """A row for each backend and set of cells that ran in the same run."""
    table = Table(header_style="bold", title="really executed", title_justify="left")
    for heading in ("backend", "format", "last", "days", "device", "library", "failed", "recipes"):
        table.add_column(heading, overflow="fold")
    rows: dict[tuple[str, ...], list[Cell]] = defaultdict(list)
    for c in cells:
        rows[c.backend, c.activation_format, c.last[:16], f"{c.days:.1f}", c.device, c.library].append(c)
    for key, of in rows.items():
        executed, failed = sum(c.executed for c in of), sum(c.failed for c in of)
        told = (*key, f"{failed} of {executed}", ", ".join(c.recipe for c in of))
        table.add_row(*(escape(printable(text)) for text in told))
    return table


def _stopped(cells: Iterable[Cell]) -> Iterator[str]:
    found = [cell for cell in cells if cell.stopped]
    if found:
        yield f"Stopped being executed: {len(found)}"
    for c in found:
        why = f"; {c.reason}" if c.reason else "; not planned any more"
        name = f"{c.backend} {c.recipe} {c.activation_format}"
        yield f"  {name}: last {c.last[:16]} in {c.run}, not in the run of {c.stopped[:16]}{why}"


def _skipped(cells: list[Cell]) -> Iterator[str]:
    if cells:
        yield "Only ever skipped, and the commonest reason:"
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for c in cells:
        rows[c.backend, c.reason].append(c.recipe)
    for (backend, reason), recipes in rows.items():
        yield f"  {backend} ({', '.join(recipes)}): {reason:.200}"


def _unplanned(cells: list[Cell]) -> Iterator[str]:
    if cells:
        yield "Never planned:"
    rows: dict[str, list[str]] = defaultdict(list)
    for c in cells:
        rows[c.backend].append(c.recipe)
    yield from (f"  {backend} ({', '.join(recipes)})" for backend, recipes in rows.items())
