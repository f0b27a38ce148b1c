"""The machinery that wrapper and all-to-all faults break is right before they break it."""

from __future__ import annotations

import pytest

from harness.backends.base import CPU
from harness.case import Case
from harness.faults.bugs.ranks_dispatch import KeptInboxes, OneSided
from harness.faults.bugs.ranks_geometry import ExactCapacity, IdsOfInt32
from harness.faults.bugs.wrapper_api import AlignmentDeclared, AutoSelected, JitBuilt, PackedIds, Placed, TwoDispatchers
from harness.faults.bugs.wrapper_out import CachedResult, ListOp
from harness.faults.bugs.wrapper_side import LoraBranch, SharedAfterRouted
from harness.faults.bugs.wrapper_workspace import Autotuned, Chunked, HostExecutor, LastArriverFinalizes
from harness.pipeline import Options, OracleCache, run
from harness.twins.base import Twin
from harness.verdict import Status

CLEAN = (
    *(AlignmentDeclared, AutoSelected, Autotuned, CachedResult, Chunked, ExactCapacity, HostExecutor, IdsOfInt32, JitBuilt),
    *(KeptInboxes, LastArriverFinalizes, ListOp, LoraBranch, OneSided, PackedIds, Placed, SharedAfterRouted, TwoDispatchers),
)
CASES = (
    "moe.bf16.t0.h64.i32.e4.k2.default.swiglu.standard.exact.s0",
    "moe.bf16.t9.h64.i128.e16.k2.default.swiglu.standard.exact.s0",
    "moe.bf16.t3.h64.i128.e4.k1.renormalize.swiglu.standard.real.s0",
    "moe.nvfp4.t9.h64.i64.e3.k2.sigmoid.swiglu.standard.exact.s0",
)
POOL = {case: OracleCache() for case in CASES}  # every backend of one rounding shares inputs and expectations


@pytest.mark.parametrize("twin", CLEAN, ids=lambda twin: twin.__name__)
def test_the_machinery_is_right_until_a_fault_breaks_it(twin: type[Twin]) -> None:
    backend = twin.backend(twin.__name__)
    verdicts = [run(Case.parse(case), backend, CPU, cache=POOL[case], options=Options(1)) for case in CASES]
    assert not [v.reason for v in verdicts if v.status.failed]
    assert sum(v.status is Status.PASSED for v in verdicts) >= 2
