"""Executes a plan by driving the pytest suites, with a progress bar, and reports what the journal says."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from harness import config, journal, pooled, run_info, sanitized
from harness.backends import discover
from harness.case import Case
from harness.errors import MoecheckError
from harness.executed import Reach, Ways, ran
from harness.known import Outcome, outcome
from harness.plan import Plan
from harness.plan import grid as grid_of
from harness.report import coverage, junit, markdown
from harness.report.table import summary
from harness.report.text import explain, line

if TYPE_CHECKING:
    from harness.verdict import Verdict

SUITES = Path(__file__).resolve().parent.parent / "suites"
SHOWN_FAILURES = 20
STRENGTHS = (2, 3)  # pairs and triples: what the tiers promise


class Incomplete(Exception):
    """Some planned cases have no verdict; the message says how to go on."""


class _Watcher:
    """A pytest plugin of one run: the progress bar, and the errors that pytest would print."""

    def __init__(self, total: int, done: int, console: Console, verbose: bool) -> None:
        self.errors: list[str] = []
        self.stopped = ""
        self._console, self._verbose, self._count = console, verbose, 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        self._bar.disable = not console.is_terminal
        self._task: TaskID = self._bar.add_task("judging", total=total, completed=done, rate="")

    def pytest_sessionstart(self) -> None:
        self._bar.start()

    def pytest_sessionfinish(self) -> None:
        self._bar.stop()

    def pytest_moecheck_verdict(self, verdict: Verdict) -> None:
        if self._verbose:
            self._console.print(line(verdict), markup=False)
        elapsed = self._bar.tasks[0].elapsed
        self._count += 1
        rate = f"{self._count / elapsed:.1f} cases/s" if elapsed else ""
        self._bar.update(self._task, advance=1, rate=rate)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and report.when != "call":  # a red verdict fails the call; anything else is ours
            self.errors.append(report.longreprtext)

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        if isinstance(excinfo.value, pytest.exit.Exception):
            self.stopped = str(excinfo.value.msg).removeprefix("moecheck: ")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors.append(report.longreprtext)


def execute(plan: Plan, folder: Path, out: Console, err: Console, verbose: bool, jobs: int = 1) -> int:
    """Run what is left of `plan`, print the report, return the exit code (0, 1 or 3); Incomplete if cases are missing. jobs:
    pytest processes (pytest-xdist) that share it."""
    done = len(journal.read(folder))
    started = time.monotonic()
    info = run_info.read(folder) or run_info.RunInfo(
        run_info.now(), plan.request.platform, plan.request.tier, plan.digest, revision=run_info.revision()
    )
    run_info.write(folder, info)
    watcher = _Watcher(len(plan.items), done, err if err.is_terminal else out, verbose)
    arguments = [
        str(SUITES / "layer"),
        str(SUITES / "ops"),
        "--run-dir",
        str(folder),
        "-p",
        "no:terminal",
        "-p",
        "no:cacheprovider",
        "-s",
    ]
    arguments += ["--assert=plain", "--maxfail=0"]  # nothing to rewrite; PYTEST_ADDOPTS=-x must not end the run
    arguments += ["-W", "default"]  # a foreign plugin's warning (pytest-benchmark under xdist) must not either
    arguments += [] if jobs == 1 else ["-n", str(jobs)]
    code = pytest.main(arguments, plugins=[watcher])
    if watcher.stopped:
        raise MoecheckError(watcher.stopped)
    if code == pytest.ExitCode.USAGE_ERROR:  # pytest has said why
        return 3
    verdicts = journal.read(folder)
    run_info.write(folder, info.stopped(time.monotonic() - started, whole=len(verdicts) == len(plan.items)))
    junit.write(folder / "junit.xml", plan.items, verdicts)
    reached = _reached(plan, verdicts)
    coverage.write(folder / "coverage.json", reached)
    markdown.write(folder / "summary.md", verdicts, reached)
    _report(verdicts, reached, folder, out)
    missing = len(plan.items) - len(verdicts)
    if watcher.errors:
        err.print("moecheck itself failed:\n" + watcher.errors[0], markup=False, style="red")
        return 3
    if code in (3, pytest.ExitCode.INTERNAL_ERROR):
        return 3
    if missing:
        raise Incomplete(f"{missing} of {len(plan.items)} cases have no verdict; continue with: moecheck run --resume {folder}")
    verdicts += sanitized.sweep(plan, folder, config.tier(plan.request.tier).sanitizer, out)
    red = any(outcome(v) in (Outcome.RED, Outcome.GONE) for v in verdicts)
    return 1 if red or pooled.alarms(verdicts) else 0


def _reached(plan: Plan, verdicts: list[Verdict]) -> dict[str, list[Ways]]:
    """Backend -> the pairs and triples of its grid that verdicts of this run really executed."""
    backends = discover(plan.request.plugins)
    found = {}
    for name in sorted({item.subject for item in plan.items} & set(backends)):
        if grid := grid_of(plan.request, backends[name]):
            cases = [Case.parse(v.case_id) for v in verdicts if v.subject == name and ran(v)]
            reach = Reach(grid)
            found[name] = [reach.ways(cases, strength) for strength in STRENGTHS]
    return found


def _report(verdicts: list[Verdict], reached: dict[str, list[Ways]], folder: Path, out: Console) -> None:
    groups: dict[Outcome, list[Verdict]] = {kind: [v for v in verdicts if outcome(v) is kind] for kind in Outcome}
    if groups[Outcome.KNOWN]:
        out.print("Known issues, failing as described:", style="yellow")
        for issue in sorted({v.known for v in groups[Outcome.KNOWN]}):
            mine = [v for v in groups[Outcome.KNOWN] if v.known == issue]
            out.print(f"  {issue}: {len(mine)} cases, e.g. {mine[0].rerun}", markup=False)
    for verdict in groups[Outcome.GONE]:
        out.print(f"GONE: known issue {verdict.known} passes now: {verdict.rerun}", markup=False, style="red")
    for verdict in groups[Outcome.RED][:SHOWN_FAILURES]:
        out.print(explain(verdict), markup=False)
    for pool in pooled.alarms(verdicts):
        out.print(f"WRONG {pool.subject}: {pool}; each case alone is within its limit", markup=False, style="red")
    for verdict, note in [(v, n) for v in verdicts if not v.status.failed for n in v.notes][:SHOWN_FAILURES]:
        out.print(f"note on {verdict.subject}:{verdict.case_id}: {note.text}", markup=False, style="yellow")
    if len(groups[Outcome.RED]) > SHOWN_FAILURES:
        out.print(f"... and {len(groups[Outcome.RED]) - SHOWN_FAILURES} more failures in {folder / journal.NAME}", markup=False)
    width = shutil.get_terminal_size((140, 40)).columns
    table = Console(width=width, highlight=False, file=out.file, force_terminal=out.is_terminal)
    table.print(summary(verdicts, _versions(verdicts)))
    skips = sorted({(v.subject, v.reason) for v in groups[Outcome.SKIPPED]})
    for subject, reason in skips[:SHOWN_FAILURES]:
        out.print(f"skipped {subject}: {reason}", markup=False)
    out.print(coverage.text(reached), markup=False)
    red, total = len(groups[Outcome.RED]) + len(groups[Outcome.GONE]), len(verdicts)
    green, known = len(groups[Outcome.GREEN]), len(groups[Outcome.KNOWN])
    out.print(
        f"{total} verdicts: {green} passed, {red} failed, {known} known, {len(groups[Outcome.SKIPPED])} skipped; {folder}",
        markup=False,
    )


def _versions(verdicts: list[Verdict]) -> dict[str, str]:
    """backend -> the last two environment entries that are not machine facts: its library and version."""
    machine = {"python", "arch", "device", "driver", "cuda"}
    found = {}
    for verdict in verdicts:
        libraries = [f"{k} {v}" for k, v in verdict.environment.items() if k not in machine]
        if libraries:
            found[verdict.subject] = libraries[-1]
    return found
