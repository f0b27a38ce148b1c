"""`moecheck shrink`: the smallest case that fails in the same way, found through crashes and hangs."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from harness import config
from harness.backends import discover
from harness.backends.base import Backend, Device
from harness.case import Case
from harness.cli_options import Platform, Plugins
from harness.errors import MoecheckError
from harness.isolated import Isolated
from harness.known import mark
from harness.plan import known_backend
from harness.report.text import explain
from harness.session import detected_platform, device_of
from harness.shrink import Search
from harness.space import below
from harness.steady import Answers, confirm, signature
from harness.verdict import Stage, Status, Verdict

FAILED = 1  # exit code: the case fails, steadily or now and then
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)


def shrink(  # noqa: PLR0913 - typer turns parameters into options
    case_id: Annotated[str, typer.Argument(metavar="ID", help="Id of a case that fails, as its verdict prints it.")],
    backend: Annotated[str, typer.Option("--backend", "-b", help="The backend it fails on.")],
    platform: Platform = None,
    plugin: Plugins = None,
    limit: Annotated[float, typer.Option(help="Seconds a case may take: more is a hang.", min=0.1)] = 60.0,
    budget: Annotated[float, typer.Option(help="Seconds after which no further case is started.", min=1)] = 600.0,
    runs: Annotated[int, typer.Option(help="Cases after which no further one is started.", min=1)] = 1000,
) -> None:
    """Shrink a failing case to the smallest that fails in the same way: sizes, routing, activation, fill and seed."""
    case = Case.parse(case_id)
    plugins = tuple(plugin or ())
    subject = known_backend(backend, discover(plugins))
    device = device_of(platform or detected_platform())
    with tempfile.TemporaryDirectory(prefix="moecheck-") as logs, Isolated(device, plugins, Path(logs), limit) as workers:
        shown = _Shown(workers, subject, budget, runs)
        with shown.progress:
            shown.shrink(case, device)
    raise typer.Exit(FAILED)


class _Shown:
    """One shrinking, told while it goes on."""

    def __init__(self, workers: Isolated, backend: Backend, budget: float, most: int) -> None:
        self._workers, self._backend, self._most = workers, backend, most
        self._started = time.monotonic()
        self._deadline = self._started + budget
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self.progress = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
        self._task = self.progress.add_task("judging")

    def shrink(self, case: Case, device: Device) -> None:
        """Confirm, shrink, confirm again; MoecheckError where there is nothing to shrink."""
        if not (support := self._backend.supports(case, device)).ok:
            raise MoecheckError(f"{self._backend.name} does not take {case}: {support.reason}")
        answers = confirm(case, self._fresh, self._more)
        if not self._fails(answers):
            return
        wanted = signature(answers.verdicts[0])
        self._tell(f"{answers.text}; shrinking")
        search = Search(self._judge, below(case, self._backend), wanted, self._more, self._found)
        smallest = search.shrink(case)
        last = confirm(smallest, self._fresh, self._more) if smallest != case else answers
        if not self._fails(last, of=smallest):
            return
        out.print(explain(mark(last.verdicts[-1], config.known_issues())), markup=False)
        what = "the smallest found before time or runs were spent" if search.spent else "the smallest found"
        same = "; it cannot be made smaller" if smallest == case and not search.spent else ""
        self._tell(f"{what}: {smallest.id}{same}")

    def _fails(self, answers: Answers, of: Case | None = None) -> bool:
        """Steadily so. Says what else it is: MoecheckError if it passes."""
        first = answers.verdicts[0]
        if first.status.skipped:
            raise MoecheckError(f"{first.status}: {first.reason}; nothing to shrink")
        if first.status is Status.HUNG and first.stage in (Stage.SUPPORT, Stage.INPUTS, Stage.ORACLE):
            raise MoecheckError(f"{first.reason}, before the kernel was called; raise --limit")
        if answers.steady and first.status.failed:
            return True
        if answers.steady:
            raise MoecheckError(f"{first.case_id} passes here; nothing to shrink ({answers.text})")
        worst = next(v for v in answers.verdicts if v.status.failed)
        what = "the case" if of is None else "the smallest case found"
        out.print(f"FLAKY: {what} does not fail every time: {answers.text}", style="yellow")
        self._tell(f"nothing was shrunk that can be trusted; one of the failures: {worst.rerun}")
        return False

    def _more(self) -> bool:
        return time.monotonic() < self._deadline and self._workers.runs < self._most

    def _fresh(self, case: Case) -> Verdict:
        return self._noted(self._workers.fresh(case, self._backend.name))

    def _judge(self, case: Case) -> Verdict:
        return self._noted(self._workers.judge(case, self._backend.name))

    def _noted(self, verdict: Verdict) -> Verdict:
        self.progress.update(self._task, description=f"run {self._workers.runs}: {verdict.status} {verdict.case_id}")
        return verdict

    def _found(self, case: Case) -> None:
        self._tell(case.id)

    def _tell(self, text: str) -> None:
        out.print(f"{self._workers.runs:4d} runs {time.monotonic() - self._started:6.1f} s  {text}", markup=False)
