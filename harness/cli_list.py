"""moecheck list: what runs where on a platform, or, with --cases or a selection, the plan case by case."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from harness import config
from harness.backends import discover
from harness.cli_options import ERR, OUT, Backends, Cases, Ops, Platform, Plugins, TierName
from harness.cli_run import plan_of, request_of
from harness.errors import MoecheckError
from harness.matrix import Cell, Way, matrix
from harness.plan import Plan
from harness.session import detected_platform

SCHEMA = 1
AsJson = Annotated[bool, typer.Option("--json", help="The matrix as JSON.")]
AsCases = Annotated[bool, typer.Option("--cases", help="The plan, case by case; also with --tier, --backend, --op or --case.")]


def command(  # noqa: PLR0913 - typer turns parameters into options
    platform: Platform = None,
    tier: TierName = None,
    backend: Backends = None,
    op: Ops = None,
    case: Cases = None,
    plugin: Plugins = None,
    as_cases: AsCases = False,
    as_json: AsJson = False,
) -> None:
    """Print what runs where on a platform, or the plan: subject and case id, one per line."""
    if as_cases or any((tier, backend, op, case)):
        if as_json:
            raise MoecheckError("--json is of the matrix; the plan is lines already, and plan.json in each run folder")
        cases(plan_of(request_of(platform, tier, backend, op, case, plugin), here=False), OUT, ERR)
    else:
        show(platform or detected_platform(), plugin or [], as_json, OUT)


def cases(plan: Plan, out: Console, err: Console) -> None:
    """Subject and case id, one per line."""
    for item in plan.items:
        out.print(f"{item.subject}  {item.case_id}", markup=False)
    counts = Counter(item.subject for item in plan.items)
    err.print(f"{len(plan.items)} cases: " + ", ".join(f"{name} {n}" for name, n in counts.items()))


def show(platform: str, plugins: list[str], as_json: bool, out: Console) -> None:
    """The matrix of a platform; no GPU is needed and nothing is run."""
    loaded = config.platform(platform)
    found = matrix(loaded, discover(plugins))
    if as_json:
        data: dict[str, Any] = {"schema": SCHEMA, "platform": platform, "arch": loaded.arch}
        data |= {"cells": [_plain(c) for c in found], "hazards": [hazard.model_dump() for hazard in loaded.hazards]}
        out.print(json.dumps(data, indent=1), markup=False)
        return
    table = _table(found, f"{platform}: what runs where")
    wide = out if out.is_terminal else Console(width=_natural(table, out), highlight=False, file=out.file)
    wide.print(table)
    out.print(_counts(found), markup=False)


def _natural(table: Table, out: Console) -> int:
    """Columns in which nothing folds: a pipe has no edge, and `grep` reads lines."""
    return Measurement.get(out, out.options.update(width=sys.maxsize), table).maximum


def _plain(cell: Cell) -> dict[str, Any]:
    return {**asdict(cell), "ways": list(cell.ways), "routings": list(cell.routings)}


def _counts(found: list[Cell]) -> str:
    by_way = {way: [cell for cell in found if way in cell.ways] for way in Way}
    return ", ".join(
        f"{len(cells)} cells {way} ({len({c.subject for c in cells})} subjects)" for way, cells in by_way.items() if cells
    )


def _table(found: list[Cell], title: str) -> Table:
    """One row for each subject and set of equal cells; its recipes in one column."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for heading in ("backend or entry point", "library", "runs", "format", "routing", "padded to multiples of", "recipes"):
        table.add_column(heading, overflow="fold")
    rows: dict[tuple[str, str, str, str, str, str], list[str]] = {}
    for c in found:
        routing = "top-k ids" if not c.routings else ", ".join(c.routings)
        key = (c.subject, c.library, " + ".join(c.ways), c.activation_format, routing, c.padding)
        rows.setdefault(key, []).append(c.recipe)
    for key, recipes in rows.items():
        table.add_row(*key, ", ".join(recipes))
    return table
