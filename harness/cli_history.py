"""`moecheck history`: what regressed, flakes, drifts and is slow in a folder of runs; `moecheck history add`: one more run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from harness.errors import MoecheckError
from harness.history.answers import Drift, Flake, Regression, Seen, Slow
from harness.history.query import History
from harness.history.store import Place, add
from harness.reading import printable

CLEAN, KERNEL_FAILED, USER_ERROR = 0, 1, 3  # exit codes
SCHEMA = 1
SHOWN = 20
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]
Days = Annotated[float | None, typer.Option(help="Only runs begun in the last so many days.", min=0.001)]
Now = Annotated[str | None, typer.Option(help="Answer as at this time (ISO 8601); default: now.")]


def command(
    words: Annotated[
        list[str], typer.Argument(metavar="DIR|URL, or add RUN...", help="A folder of run folders, or a URL of fsspec.")
    ],
    to: Annotated[str | None, typer.Option(help="add: the history that the runs are copied to.")] = None,
    days: Days = None,
    now: Now = None,
    slowest: Annotated[int, typer.Option(help="How many of the slowest cases.", min=0)] = 10,
    as_json: AsJson = False,
) -> None:
    """What changed over many runs; exit code 1 for a regression. `add RUN... --to DIR|URL` copies runs into a history."""
    if words[0] == "add":
        _add(words[1:], to)
        return
    if len(words) > 1 or to is not None:
        raise MoecheckError("moecheck history takes one DIR or URL, or add RUN... --to DIR|URL; a folder called add is ./add")
    with cache() as folder, History(words[0], folder, since(days, now)) as history:
        runs, regressions, flakes = history.runs(), history.regressions(), history.flakes()
        drifts, slow = history.drift(), history.slowest(slowest)
    if as_json:
        found: dict[str, Sequence[Any]] = {"runs": runs, "flakes": flakes, "slowest": slow, "drift": drifts}
        data = {name: [asdict(one) for one in values] for name, values in found.items()}
        data |= {"regressions": [r.to_json() for r in regressions]}
        out.print(json.dumps({"schema": SCHEMA, **data, "left_out": history.left_out}, indent=1), markup=False)
    else:
        for line in (*_runs(runs), *_regressions(regressions), *_flakes(flakes), *_drifts(drifts), *_slow(slow)):
            out.print(printable(line), markup=False)
    raise typer.Exit(finished(history.left_out, KERNEL_FAILED if regressions else CLEAN))


def _add(runs: list[str], to: str | None) -> None:
    if to is None or not runs:
        raise MoecheckError("moecheck history add RUN... --to DIR|URL: name the run folders, and where they go")
    place = Place(to)
    for run in runs:
        added = add(Path(run), place)
        text = f"{added.verdicts} verdicts" if added.new else "was there already"
        out.print(f"{run} -> {to.rstrip('/')}/{added.name}: {text}", markup=False)


@contextmanager
def cache() -> Iterator[Path]:
    """Where Parquet files of plain run folders are kept; a folder for this time only where no cache can be."""
    try:
        from platformdirs import user_cache_path

        folder = user_cache_path("moecheck") / "history"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (ImportError, OSError, RuntimeError):
        with tempfile.TemporaryDirectory(prefix="moecheck-") as name:
            yield Path(name)
    else:
        yield folder


def moment(now: str | None) -> datetime:
    """The time that was given, else now; in UTC where it says no zone."""
    try:
        found = datetime.now(UTC) if now is None else datetime.fromisoformat(now)
    except ValueError as error:
        raise MoecheckError(
            f"--now {printable(now or '')}: wanted ISO 8601, e.g. 2026-11-23 or 2026-11-23T03:00:00+00:00"
        ) from error
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def since(days: float | None, now: str | None) -> str:
    """The start of a window of days, as runs have it; "" for all time."""
    return "" if days is None else (moment(now) - timedelta(days=days)).astimezone(UTC).isoformat(timespec="seconds")


def finished(left_out: list[str], code: int) -> int:
    """The exit code, after telling what could not be read: an answer without it is not clean."""
    for text in left_out:
        err.print(f"moecheck: left out: {text}", style="red", markup=False)
    return USER_ERROR if left_out and code == CLEAN else code


def _runs(runs: list[Seen]) -> Iterator[str]:
    if not runs:
        yield "no run in this time"
        return
    platforms = ", ".join(sorted({run.platform for run in runs}))
    first, last = runs[0].started[:16], runs[-1].started[:16]
    yield f"{len(runs)} runs from {first} to {last} UTC on {platforms}: {sum(run.verdicts for run in runs)} verdicts"
    if undated := [run for run in runs if run.dated == "mtime"]:
        yield f"  {len(undated)} without run.json, dated by their journal's file: {_names([run.run for run in undated])}"


def _names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _regressions(found: list[Regression]) -> Iterator[str]:
    yield f"Regressions since the last good run: {len(found) or 'none'}"
    for r in found[:SHOWN]:
        yield f"  {r.subject} {r.case_id}"
        runs = "run" if r.runs == 1 else "runs"
        yield f"    passed in {r.good} ({r.good_started[:16]}), fails since {r.bad} ({r.bad_started[:16]}), {r.runs} {runs}"
        yield f"    changed: {r.changed}"
        yield f"    {r.status}: {r.reason:.200}"
        yield f"    moecheck repro {r.case_id} --backend {r.subject} --platform {r.platform}"
    yield from _rest(found)


def _flakes(found: list[Flake]) -> Iterator[str]:
    yield f"Flaky, same versions and both outcomes or a death that fresh children did not repeat: {len(found) or 'none'}"
    for f in found[:SHOWN]:
        vanished = f", {f.vanished} of them did not happen again" if f.vanished else ""
        yield f"  {f.subject} {f.case_id}"
        share = f"{100 * f.failed / f.runs:.0f} %" if f.runs else "-"
        yield f"    {f.failed} of {f.runs} runs ({share}){vanished}, last {f.last[:16]} {f.status}; {f.pattern}"
    yield from _rest(found)


def _drifts(found: list[Drift]) -> Iterator[str]:
    moved = [d for d in found if d.moved]
    yield f"Drift of the errors beyond chance: {len(moved) or 'none'} of {len(found)} changes of a library's release"
    for d in moved[:SHOWN]:
        means = "" if d.old_mean_z2 is None else f"mean z^2 {d.old_mean_z2:.3f} -> {d.new_mean_z2:.3f} ({d.z:+.1f} sd), "
        yield f"  {d.subject} {d.recipe} on {d.arch}, {d.old} -> {d.new}, {d.cases} cases: {means}rel-L2 x {d.rel_l2:.3f}"
    yield from _rest(moved)


def _slow(found: list[Slow]) -> Iterator[str]:
    if found:
        yield "Slowest cases, median and worst seconds:"
    for s in found:
        yield f"  {s.median_s:8.2f} {s.worst_s:8.2f}  {s.subject} {s.case_id} on {s.arch}, {s.runs} runs"


def _rest(found: Sequence[object]) -> Iterator[str]:
    if len(found) > SHOWN:
        yield f"  and {len(found) - SHOWN} more: --json has them"
