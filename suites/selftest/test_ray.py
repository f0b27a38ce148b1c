"""A plan on a real Ray cluster of three raylets on this machine, of which one is killed half way."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import journal
from harness.executor.on_ray import cluster
from harness.plan import Plan, Request
from harness.select import Item
from harness.session import Session, begin
from harness.verdict import Status

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'moecheck[ray]'")
ROOT = Path(__file__).resolve().parents[2]
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}
SUBJECT = "torch_grouped_mm"
DEADLY = """
import os, signal, time
from dataclasses import replace
from harness.backends.torch_grouped_mm import BACKENDS as REAL

def dies(case, inputs):
    os.kill(os.getpid(), signal.SIGSEGV)

def slow(case, inputs):
    time.sleep(0.3)
    return REAL[0].prepare(case, inputs)

BACKENDS = (replace(REAL[0], name="dies", prepare=dies), replace(REAL[0], name="slow", prepare=slow))
"""
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def raylets() -> Iterator[Any]:
    """A cluster with two nodes beside its head, a CPU each."""
    from ray.cluster_utils import Cluster

    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "RAY_USAGE_STATS_ENABLED")}
    os.environ |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args={**node, "_system_config": QUICK})
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    yield found
    ray.shutdown()
    found.shutdown()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def plan_of(tmp_path: Path, count: int, *subjects: str) -> Plan:
    plugin = tmp_path / "deadly.py"
    plugin.write_text(DEADLY)
    ids = [f"moe.bf16.t3.h64.i64.e8.k1.renormalize.swiglu.standard.real.s{seed}" for seed in range(count)]
    items = tuple(Item(case, subject) for case in ids for subject in subjects)
    return Plan(Request("cpu", "smoke", plugins=(str(plugin),)), 30.0, items, checks=0)


def test_a_killed_node_costs_only_what_it_was_judging(raylets: Any, tmp_path: Path) -> None:
    nodes = [raylets.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]
    raylets.wait_for_nodes()
    plan = plan_of(tmp_path, 12, "slow")
    seen, killed = [], nodes[0].node_id
    with cluster(plan, list(plan.items), None) as devices:
        places = [told["node"] for told in ray.get([hired.started for hired in devices.hired])]
        for verdict in devices.verdicts():
            seen.append(verdict)
            if len(seen) == 3:
                raylets.remove_node(nodes[0], allow_graceful=False)
        left = {hired.node for hired in devices.hired}
    assert sorted(Item(v.case_id, v.subject) for v in seen) == sorted(plan.items)
    assert {v.status for v in seen} == {Status.PASSED}
    assert killed in places
    assert len(set(places)) == 3
    assert killed not in left


def test_a_killed_actor_is_replaced_where_its_node_lives_on(raylets: Any, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 4, "slow")
    with cluster(plan, list(plan.items), 1) as devices:
        verdicts = devices.verdicts()
        seen = [next(verdicts)]
        os.kill(devices.hired[0].process, signal.SIGKILL)
        seen += verdicts
    assert sorted(v.case_id for v in seen) == sorted(item.case_id for item in plan.items)
    assert {v.status for v in seen} == {Status.PASSED}


def test_a_crash_is_a_verdict_and_a_run_goes_on_where_another_executor_stopped(raylets: Any, tmp_path: Path, moecheck) -> None:  # type: ignore[no-untyped-def]
    folder, plan = tmp_path / "run", plan_of(tmp_path, 2, SUBJECT, "dies")
    folder.mkdir()
    begin(plan, folder)
    session = Session(plan, folder)
    try:
        session.judge(plan.items[0])
    finally:
        session.close()
    answer = moecheck("run", "--resume", str(folder), "--executor", "ray", "--jobs", "1")
    assert answer.code == 1, answer.err
    assert "4 verdicts: 2 passed, 2 failed" in answer.out
    verdicts = journal.read(folder)
    assert verdicts[0].case_id == plan.items[0].case_id
    assert [v.status for v in verdicts if v.subject == "dies"] == [Status.CRASHED] * 2
    assert all("SIGSEGV" in v.reason for v in verdicts if v.subject == "dies")
