"""The correct machinery that faults of routing and alignment break: right without the fault."""

from __future__ import annotations

import pytest

from harness.backends.base import CPU
from harness.case import Case
from harness.faults.bugs.align_adapters import AdapterMoe
from harness.faults.bugs.align_addresses import ScaledRowsMoe
from harness.faults.bugs.align_replicas import ReplicatedMoe
from harness.faults.bugs.align_sentinel import ContiguousMoe, GatherMoe
from harness.faults.bugs.routing_select import OwnRouter
from harness.faults.bugs.routing_shared import SharedExpertMoe
from harness.pipeline import Options, run
from harness.twins.base import Twin
from harness.verdict import Status

CASES = (
    "moe.bf16.t0.h64.i32.e4.k2.sigmoid.silu.standard.exact.s0",
    "moe.bf16.t7.h64.i32.e5.k2.minimax2.silu.standard.exact.s0",
    "moe.bf16.t2.h64.i32.e16.k3.deepseek_v3.silu.standard.real.s0",
)
CHECKS = 5  # relations of a case; the three share them out
CLEAN = (AdapterMoe, ContiguousMoe, GatherMoe, OwnRouter, ReplicatedMoe, ScaledRowsMoe, SharedExpertMoe)


@pytest.mark.parametrize("case_id", CASES)
@pytest.mark.parametrize("twin", CLEAN, ids=lambda twin: twin.__name__)
def test_the_machinery_is_right_before_a_fault_breaks_it(twin: type[Twin], case_id: str) -> None:
    verdict = run(Case.parse(case_id), twin.backend(f"clean_{twin.__name__}"), CPU, options=Options(CHECKS))
    assert verdict.status is Status.PASSED, verdict.reason
