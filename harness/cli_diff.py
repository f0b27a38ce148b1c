"""`moecheck diff`: what changed from one run to another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from harness import journal, run_info
from harness.errors import MoecheckError
from harness.reading import printable
from harness.regress import Cell, Changes, Drift, Moved, compare

CLEAN, REGRESSED = 0, 1
SHOWN = 20  # lines of a kind: as many failures as `run` prints
out = Console(soft_wrap=True, highlight=False)

Run = Annotated[Path, typer.Argument(help="Run folder, or a journal file.")]


def command(
    before: Run,
    after: Run,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all of it here too.")] = None,
    every: Annotated[bool, typer.Option("--all", help=f"Every line, not the first {SHOWN} of a kind.")] = False,
) -> None:
    """New failures, fixed, changed statuses and diagnoses, drift, lost cells; exit 1 at a new failure or a lost cell."""
    changes = compare(journal.read_from(before), journal.read_from(after))
    if json_file is not None:
        write(json_file, changes)
    for path, letter in ((before, "A"), (after, "B")):
        out.print(f"{letter}: {path}{_when(path)}", markup=False)
    for line, style in told(changes, None if every else SHOWN):
        out.print(printable(line), style=style, markup=False)
    if not changes.quiet:
        width = shutil.get_terminal_size((120, 40)).columns
        Console(width=width, highlight=False, file=out.file, force_terminal=out.is_terminal).print(table(changes))
    out.print(ending(changes), markup=False)
    raise typer.Exit(REGRESSED if changes.regressed else CLEAN)


def write(path: Path, changes: Changes) -> None:
    """The changes as JSON, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(changes.to_json(), indent=1, allow_nan=False) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise MoecheckError(f"--json {path}: cannot be written: {error.strerror}; choose another file") from error


def _when(path: Path) -> str:
    info = run_info.read(path) if path.is_dir() else None
    return (
        "" if info is None else f"  ({info.started}, tier {info.tier} on {info.platform}, commit {info.revision[:12] or '-'})"
    )


def told(changes: Changes, most: int | None) -> Iterator[tuple[str, str]]:
    """(line, style): the changes in words, `most` of each kind."""
    for title, style, rows in (
        ("new failure", "red", changes.new_failures),
        ("fixed", "green", changes.fixed),
        ("status", "yellow", changes.status),
        ("diagnosis", "yellow", changes.diagnosis),
    ):
        for row in rows[:most]:
            yield from _moved(title, style, row)
        if most is not None and len(rows) > most:
            yield f"... and {len(rows) - most} more: {title}; --all shows them", style
    for title, style, cells in (("lost", "red", changes.lost), ("gained", "green", changes.gained)):
        verb = "are no longer executed" if title == "lost" else "were not executed before"
        for cell in cells:
            where = f"{cell.subject} x {cell.recipe} x {cell.activation_format}"
            yield f"{title}: {where}: {cell.cases} cases {verb}", style
    for drift in changes.drift:
        yield f"drift: {drift}", "yellow"
    for name, old, new in changes.environment:
        yield f"differs: {name} {old} -> {new}", "dim"


def _moved(title: str, style: str, row: Moved) -> Iterator[tuple[str, str]]:
    yield f"{title}: {row.subject} on {row.case_id}: {row.before} -> {row.after}", style
    if row.why:
        yield f"    {row.why[:300]}", ""
    if title == "new failure":
        yield f"    rerun: {row.rerun}", ""


def table(changes: Changes) -> Table:
    """One row per backend that changed, a count of each kind."""
    kinds: dict[str, Sequence[Moved | Cell | Drift]] = {
        "new failures": changes.new_failures,
        "fixed": changes.fixed,
        "status": changes.status,
        "diagnosis": changes.diagnosis,
        "cells lost": changes.lost,
        "cells gained": changes.gained,
        "drift": changes.drift,
    }
    shown = Table("backend", *kinds, header_style="bold")
    for subject in sorted({row.subject for rows in kinds.values() for row in rows}):
        shown.add_row(subject, *(str(sum(r.subject == subject for r in rows) or "") for rows in kinds.values()))
    return shown


def ending(changes: Changes) -> str:
    """The last line: what was compared, and at which level."""
    both = f"{changes.compared} cases in both, {len(changes.only_before)} only in A, {len(changes.only_after)} only in B"
    return f"{both}; {changes.tests} questions of drift at {changes.level:g} together" + (
        "; no change" if changes.quiet else ""
    )
