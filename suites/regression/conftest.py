"""One worker for all bugs of the past: a crash of one must not change the next one's verdict either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from harness.backends.base import CPU
from harness.case import Case
from harness.faults.catalogue import FAULTS
from harness.verdict import Status, Verdict
from harness.worker.supervisor import Supervisor

FOLDER = Path(__file__).parent
PLUGINS = ("harness.faults.catalogue", str(FOLDER / "foreign_out.py"), str(FOLDER / "sm90_mixed.py"))
LIMIT_S, HUNG_S = 30.0, 2.0  # a case takes 0.02 to 0.3 s
BY_NAME = {fault.name: fault for fault in FAULTS}

Judge = Callable[[str, str, int | None], Verdict]


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    """judge(case, subject, checks): the worker's verdict; checks: how many relations, None for all."""
    with Supervisor(CPU, PLUGINS, tmp_path_factory.mktemp("regression"), LIMIT_S) as worker:

        @cache
        def one(case: str, subject: str, checks: int | None) -> Verdict:
            worker.checks = checks
            return worker.judge(Case.parse(case), subject)

        one.worker = worker  # type: ignore[attr-defined]
        yield one


@pytest.fixture
def stays_dead(judge: Judge) -> Callable[..., None]:
    """stays_dead(fault, thread, case, status, says, checks): the planted bug gets that status, and a reason that says so, at
    that case; the clean subject passes it."""

    def check(name: str, thread: str, case: str, status: Status, says: str, checks: int | None = 0) -> None:
        fault = BY_NAME[name]
        assert fault.thread.endswith(thread)
        clean = judge(case, fault.clean.name, checks)
        assert clean.status is Status.PASSED, f"the clean {clean.subject}: {clean.status} {clean.reason}"
        judge.worker.limit_s = HUNG_S if status is Status.HUNG else LIMIT_S  # type: ignore[attr-defined]
        verdict = judge(case, name, checks)
        judge.worker.limit_s = LIMIT_S  # type: ignore[attr-defined]
        assert verdict.status is status, f"{fault.thread}: {verdict.status} {verdict.reason}"
        assert says in verdict.reason, verdict.reason

    return check
