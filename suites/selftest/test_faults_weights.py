"""The clean machinery that faults of weight preparation, quantisation and finalize break: without the fault it is right."""

from __future__ import annotations

import pytest

from harness.backends.base import CPU
from harness.case import Case
from harness.faults.bugs.finalize_sum import MarkedSlots
from harness.faults.bugs.finalize_weight import DeferredFinalize, DirectTopOne, WeightedEarly
from harness.faults.bugs.quantize_rows import ScaledRows
from harness.faults.bugs.weights_cache import CachedOrder, LowRankBranch
from harness.faults.bugs.weights_order import Preshuffled, UpFirst
from harness.faults.bugs.weights_scales import SaturatedExport, SwizzledPerCall
from harness.pipeline import Options, run
from harness.twins.base import Twin
from harness.verdict import Status

DENSE = (
    "moe.bf16.t9.h64.i32.e4.k2.sigmoid.swiglu.standard.real.s0",
    "moe.bf16.t2.h64.i96.e5.k2.default.silu.standard.exact.s0",
)
TOP_ONE = (
    "moe.bf16.t9.h64.i32.e16.k1.deepseek_v3.swiglu.standard.real.s0",
    "moe.nvfp4.t3.h64.i32.e4.k1.sigmoid.swiglu.standard.exact.s0",
)
BLOCKS = (
    "moe.nvfp4.t3.h96.i32.e2.k2.default.swiglu.standard.real.s0",
    "moe.nvfp4.t2.h96.i160.e2.k2.default.swiglu.standard.exact.s0",
)
RELATIONS = 2  # asked per case, as in tier ci
CLEAN: tuple[tuple[type[Twin], tuple[str, ...]], ...] = (
    (UpFirst, (DENSE[0], BLOCKS[0])),
    (Preshuffled, (DENSE[0], BLOCKS[0])),
    (LowRankBranch, DENSE),
    (CachedOrder, (DENSE[0], BLOCKS[0])),
    (SwizzledPerCall, BLOCKS),
    (SaturatedExport, BLOCKS),
    (ScaledRows, (DENSE[0], BLOCKS[0])),
    (WeightedEarly, TOP_ONE),
    (DirectTopOne, TOP_ONE),
    (DeferredFinalize, DENSE),
    (MarkedSlots, DENSE),
)


@pytest.mark.parametrize(("twin", "cases"), CLEAN, ids=lambda value: value.__name__ if isinstance(value, type) else "")
def test_machinery_without_the_fault_passes(twin: type[Twin], cases: tuple[str, ...]) -> None:
    for case_id in cases:
        verdict = run(Case.parse(case_id), twin.backend(f"clean_{twin.__name__}"), CPU, options=Options(RELATIONS))
        assert verdict.status is Status.PASSED, f"{case_id}: {verdict.reason}"
