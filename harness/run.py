"""Executes a plan by driving the pytest suites, with a progress bar, and reports what the journal says."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from harness import journal, pooled, run_info, sanitized
from harness.backends import discover
from harness.case import Case
from harness.errors import Incomplete, MoecheckError, PluginError, RunFolderError
from harness.executed import Reach, Ways, ran
from harness.known import Outcome, outcome
from harness.plan import Plan, Request
from harness.plan import grid as grid_of
from harness.report import coverage, junit, markdown
from harness.report.table import MIN_WIDTH, summary
from harness.report.text import explain, line
from harness.session import device_of, shard_of

if TYPE_CHECKING:
    from harness.verdict import Verdict

SUITES = Path(__file__).resolve().parent.parent / "suites"
SHOWN_FAILURES = 20
OURS = "moecheck: "
NIGHTLY = "nightly"  # the tier that is there to judge everything
STRENGTHS = (2, 3)  # pairs and triples: what the tiers promise


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
        text = str(excinfo.value)  # pytest.exit's, or that of a worker which stopped its session
        if text.startswith(OURS):
            self.stopped = text.removeprefix(OURS)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors.append(report.longreprtext)


@dataclass(frozen=True)
class Manner:
    """How a plan is run. verbose: a line per verdict; jobs: pytest processes (pytest-xdist) that share it, None for one, or for
    a cluster's every device; fail_fast: stop at the first failure; ray: on the devices of a Ray cluster."""

    verbose: bool = False
    jobs: int | None = None
    fail_fast: bool = False
    ray: bool = False

    def check(self, request: Request) -> None:
        """MoecheckError for a plan that is not to be run like this."""
        if ((self.jobs or 1) > 1 or self.ray) and request.soak:
            option = "--executor ray" if self.ray else "--jobs"
            raise MoecheckError(f"--soak is one process that judges every case; it does not go with {option}")
        if self.fail_fast and request.tier == NIGHTLY:
            raise MoecheckError(
                f"--fail-fast leaves the cases after the first failure unjudged; tier {NIGHTLY} is there to judge all: drop one"
            )


def execute(plan: Plan, folder: Path, out: Console, err: Console, manner: Manner) -> int:
    """Run what is left in `folder` of `plan`, or of the shard that it is; print the report, return the exit code (0, 1 or 3);
    Incomplete if cases are missing."""
    shard = shard_of(folder)
    mine = plan.share(shard)
    if not mine.items:
        out.print(f"shard {shard} is empty: the plan has {len(plan.items)} items", markup=False)
    before = journal.read(folder)
    started = time.monotonic()
    watcher = _Watcher(len(mine.items), len(before), err if err.is_terminal else out, manner.verbose)
    stop = not mine.items or (manner.fail_fast and any(map(_red, before)))
    code = pytest.ExitCode.OK if stop else _drive(mine, folder, manner, watcher)
    if watcher.stopped:
        raise MoecheckError(watcher.stopped)
    if code == pytest.ExitCode.USAGE_ERROR:  # pytest has said why
        return 3
    verdicts = journal.read(folder)
    missing = len(mine.items) - len(verdicts)
    try:
        info = run_info.read(folder) or run_info.RunInfo(
            run_info.now(), plan.request.platform, plan.request.tier, plan.digest, revision=run_info.revision()
        )  # a folder of an older release
        run_info.write(folder, info.stopped(time.monotonic() - started, whole=not missing))
        publish(mine, verdicts, folder, out)
    except OSError as error:
        again = f"every verdict is in {journal.NAME}; make room, then moecheck run --resume {folder}"
        raise RunFolderError(f"{folder}: cannot be written: {error.strerror}; {again}") from error
    if watcher.errors:
        err.print("moecheck itself failed:\n" + watcher.errors[0], markup=False, style="red")
        return 3
    if code in (3, pytest.ExitCode.INTERNAL_ERROR):
        return 3
    if missing and manner.fail_fast and any(map(_red, verdicts)):
        out.print(f"stopped at the first failure (--fail-fast): {missing} of {len(mine.items)} cases have no verdict")
        return 1
    if missing:
        raise Incomplete(f"{missing} of {len(mine.items)} cases have no verdict; continue with: moecheck run --resume {folder}")
    return exit_code(verdicts + _sanitized(plan, folder, verdicts, out))


def _sanitized(plan: Plan, folder: Path, verdicts: list[Verdict], out: Console) -> list[Verdict]:
    """The verdicts of the nightly's part under a sanitizer; Incomplete where a cluster judged the plan and this machine, its
    driver, has no such device."""
    shard = shard_of(folder)
    if not any(sanitized.owed(plan, shard, verdicts).values()):
        return []
    try:
        device_of(plan.request.platform)
    except MoecheckError as error:
        there = f"where it is: moecheck run --resume {folder}"
        raise Incomplete(f"every case has its verdict, but none under a sanitizer: {error}; {there}") from error
    return sanitized.sweep(plan, folder, sanitized.tools_of(plan.request.tier, shard), out)


def _drive(plan: Plan, folder: Path, manner: Manner, watcher: _Watcher) -> int:
    """Judge what is left of a plan, here or on a Ray cluster, into the one journal; pytest's exit code."""
    if not manner.ray:
        return pytest.main(_arguments(folder, manner), plugins=[watcher])
    from harness.executor.on_ray import cluster

    record = journal.Journal(folder)
    try:
        todo = [item for item in plan.items if item not in record.done]
        with cluster(plan, todo, manner.jobs) as devices:
            watcher.pytest_sessionstart()
            for verdict in devices.verdicts():
                record.append(verdict)
                watcher.pytest_moecheck_verdict(verdict)
                if manner.fail_fast and _red(verdict):
                    break
    finally:
        watcher.pytest_sessionfinish()
        record.close()
    return pytest.ExitCode.OK


def _arguments(folder: Path, manner: Manner) -> list[str]:
    """Of pytest, which judges what has no verdict yet in `folder`."""
    suites = [str(SUITES / "layer"), str(SUITES / "ops")]
    quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "-s"]
    quiet += ["--assert=plain"]  # nothing to rewrite
    quiet += [f"--maxfail={int(manner.fail_fast)}"]  # 0: PYTEST_ADDOPTS=-x must not end the run
    quiet += ["-W", "default"]  # a foreign plugin's warning (pytest-benchmark under xdist) must not either
    return [*suites, "--run-dir", str(folder), *quiet, *([] if (manner.jobs or 1) == 1 else ["-n", str(manner.jobs)])]


def publish(plan: Plan, verdicts: list[Verdict], folder: Path, out: Console) -> None:
    """What people and CI read of a run: junit.xml, coverage.json, summary.md, and the report on `out`."""
    junit.write(folder / "junit.xml", plan.items, verdicts)
    reached = _reached(plan, verdicts)
    coverage.write(folder / "coverage.json", reached)
    markdown.write(folder / "summary.md", verdicts, reached)
    _report(verdicts, reached, folder, out)


def exit_code(verdicts: list[Verdict]) -> int:
    """0 or 1, of a complete run."""
    return int(any(map(_red, verdicts)) or bool(pooled.alarms(verdicts)))


def _red(verdict: Verdict) -> bool:
    return outcome(verdict) in (Outcome.RED, Outcome.GONE)


def _reached(plan: Plan, verdicts: list[Verdict]) -> dict[str, list[Ways]]:
    """Backend -> the pairs and triples of its grid that verdicts of this run really executed."""
    try:
        backends = discover(plan.request.plugins)
    except PluginError:  # joined on a machine that has not run it
        backends = discover(())
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
    width = max(MIN_WIDTH, shutil.get_terminal_size((200, 40)).columns)
    table = Console(width=width, highlight=False, file=out.file, force_terminal=out.is_terminal)
    table.print(summary(verdicts, _versions(verdicts), width))
    if verdicts and len(groups[Outcome.SKIPPED]) == len(verdicts):
        out.print("NOTHING RAN: every case was skipped; no failure is not a pass", style="bold yellow")
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
