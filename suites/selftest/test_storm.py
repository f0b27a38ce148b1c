"""A storm of deaths: one right verdict per case, nobody left behind; and a death says what it depends on."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from harness import journal, plan
from harness.backends.base import CPU
from harness.case import Case
from harness.faults import deadly, storm
from harness.select import Item
from harness.session import Session
from harness.verdict import Stage, Status, Verdict
from harness.worker import process
from harness.worker.replay import Budget
from harness.worker.supervisor import Supervisor

CASES, FAULTS, LIMIT_S = 100, 30, 20.0
STORM_LIMIT_S = 4.0  # three hangs pay it
QUICK = [kind for kind in deadly.KINDS if not kind.costs_limit]
ID = "moe.bf16.t3.h64.i32.e4.k2.renormalize.swiglu.standard.real.s{}"
CLEAN = "torch_grouped_mm"


@pytest.fixture
def worker(tmp_path: Path):  # type: ignore[no-untyped-def]
    with Supervisor(CPU, (storm.PLUGIN,), tmp_path, LIMIT_S) as supervisor:
        supervisor.checks = 0
        yield supervisor


def judge(worker: Supervisor, subject: str, seed: int) -> Verdict:
    return worker.judge(Case.parse(ID.format(seed)), subject)


def test_a_storm_ends_with_one_right_verdict_per_case_and_nothing_left(tmp_path: Path) -> None:
    """A harness that survives each death alone may still leak a process or a descriptor with every one of them."""
    found = storm.run(replace(storm.plan(CASES, FAULTS, 0, QUICK), limit_s=STORM_LIMIT_S), tmp_path)
    assert not found.problems
    assert found.planned == CASES
    assert found.statuses["PASSED"] < CASES
    assert len(list((tmp_path / "log").iterdir())) <= 50


def test_a_storm_notices_what_is_wrong(tmp_path: Path) -> None:
    """A check that cannot fail would let `make soak` end green."""
    found = storm.Storm(3, 1.0, storm.Counter({Item("a", "x"): 2, Item("b", "x"): 1}), left={7}, zombies={8}, descriptors=5)
    wanted = (
        "3 verdicts on 2 of 3 cases",
        "1 processes outlived the run: [7]",
        "1 zombies: [8]",
        "5 more descriptors are open",
    )
    assert tuple(found.problems) == wanted
    crashed = Verdict(ID.format(0), CLEAN, Status.CRASHED, Stage.LAUNCH, "no")
    assert "wanted PASSED" in storm._wrong(crashed)


def test_a_death_that_depends_on_what_ran_before_names_it(worker: Supervisor) -> None:
    """Alone the case passes: without the replay the crash would be called flaky, or never found again."""
    worker.budget = Budget(20, 60.0)
    for seed in range(4):
        judge(worker, "deadly_arms" if seed == 1 else CLEAN, seed)
    verdict = judge(worker, "deadly_after", 9)
    assert verdict.status is Status.CRASHED
    culprit = f"deadly_arms:{ID.format(1)}"
    assert verdict.findings[1].evidence["after"] == [culprit]
    assert verdict.findings[1].text == f"depends on what ran before: dies after {culprit}, not alone"
    assert verdict.rerun.endswith(f" --after {culprit}")
    with Supervisor(CPU, (storm.PLUGIN,), worker._logs, LIMIT_S) as fresh:
        after = [Item(ID.format(1), "deadly_arms")]
        assert fresh.judge(Case.parse(ID.format(9)), "deadly_after", after).status is Status.CRASHED
    with Supervisor(CPU, (storm.PLUGIN,), worker._logs, LIMIT_S) as fresh:
        assert judge(fresh, "deadly_after", 9).status is Status.PASSED


def test_a_death_between_two_cases_is_told_and_blamed_on_nobody(worker: Supervisor) -> None:
    judge(worker, CLEAN, 0)
    os.kill(worker.pid, signal.SIGKILL)
    child = worker._child
    assert child is not None
    child.process.join(LIMIT_S)
    verdict = judge(worker, CLEAN, 1)
    assert verdict.status is Status.PASSED
    assert f"died between two cases after {CLEAN}:{ID.format(0)}: killed by SIGKILL" in verdict.notes[0].text


def test_the_death_of_the_fork_server_is_nobodys_fault(worker: Supervisor) -> None:
    """The system kills its children with it: blamed on the case in flight, a right kernel would be red."""
    judge(worker, CLEAN, 0)
    server = process._server()
    assert server is not None
    os.kill(server, signal.SIGKILL)
    assert [judge(worker, CLEAN, seed).status for seed in (1, 2)] == [Status.PASSED] * 2


def test_a_child_is_replaced_after_so_many_cases(worker: Supervisor) -> None:
    worker.recycle = 3
    pids = []
    for seed in range(7):
        judge(worker, CLEAN, seed)
        assert worker._child is not None
        pids.append(worker._child.pid)
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]


@pytest.mark.parametrize(("soak", "status"), [(False, Status.PASSED), (True, Status.WRONG)])
def test_only_a_soak_sees_what_needs_many_calls(tmp_path: Path, soak: bool, status: Status) -> None:
    """A table of handles that wraps after 110 layers: a child that is recycled never gets there."""
    items = tuple(Item(ID.replace("t3", "t1").format(seed), "deadly_handles") for seed in range(deadly.HANDLES + 2))
    request = plan.Request("cpu", "smoke", plugins=(storm.PLUGIN,), soak=soak)
    session = Session(plan.Plan(request, LIMIT_S, items, 0), tmp_path)
    for item in items:
        session.judge(item)
    session.close()
    statuses = [v.status for v in journal.read(tmp_path)]
    assert statuses[: deadly.HANDLES] == [Status.PASSED] * deadly.HANDLES
    assert statuses[deadly.HANDLES :] == [status] * 2
