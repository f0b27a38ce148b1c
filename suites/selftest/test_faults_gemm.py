"""The machinery that the GEMM faults break is right as long as nobody breaks it."""

from __future__ import annotations

import pytest

from harness.backends.base import CPU
from harness.case import Case
from harness.faults.bugs.gemm_config import DieOrder, StagedKernel, VectorKernels
from harness.faults.bugs.gemm_rows import AdapterMoe, DenseCombine, PaddedRows
from harness.faults.bugs.gemm_scales import FilthyPadding, QuadTiles, TransformedScales
from harness.faults.bugs.gemm_state import ProfiledTiles
from harness.faults.bugs.gemm_tiles import ScalePerStep, ScaleRowPerStep, SizedSteps
from harness.pipeline import Options, run
from harness.twins.base import Twin
from harness.verdict import Status

CLEAN: dict[type[Twin], tuple[str, ...]] = {
    ScalePerStep: ("fp8_block.t15.h256.i128.e1.k1.default.silu real", "fp8_block.t16.h256.i128.e1.k1.default.silu exact"),
    ScaleRowPerStep: ("int4_g32.t2.h160.i96.e2.k2.default.swiglu exact", "int4_g32.t1.h96.i32.e16.k2.default.silu real"),
    SizedSteps: ("int4_g32.t2.h256.i32.e2.k1.default.swiglu real", "int4_g32.t2.h64.i128.e2.k2.default.silu exact"),
    QuadTiles: ("mxfp4.t2.h160.i96.e2.k2.default.silu exact", "mxfp4.t2.h96.i32.e2.k2.default.swiglu real"),
    FilthyPadding: ("mxfp4.t2.h160.i96.e2.k2.default.swiglu exact", "mxfp4.t2.h96.i32.e2.k2.default.silu real"),
    TransformedScales: ("fp8_block.t2.h256.i128.e2.k1.default.silu real", "mxfp4.t2.h96.i96.e2.k2.default.swiglu exact"),
    DenseCombine: ("bf16.t17.h64.i32.e4.k2.default.swiglu exact", "bf16.t0.h64.i32.e4.k2.default.swiglu real"),
    PaddedRows: ("bf16.t5.h64.i32.e4.k2.default.swiglu real", "bf16.t0.h64.i32.e4.k2.default.swiglu exact"),
    AdapterMoe: ("bf16.t2.h64.i32.e16.k2.deepseek_v3.swiglu exact",),
    DieOrder: ("mxfp4.t3.h64.i96.e2.k2.default.swiglu real", "mxfp4.t4.h64.i160.e2.k2.default.swiglu exact"),
    VectorKernels: ("int8_channel.t8.h64.i32.e4.k2.default.swiglu real",),
    StagedKernel: ("bf16.t16.h64.i96.e2.k2.default.swiglu real", "bf16.t16.h64.i160.e2.k2.default.silu exact"),
    ProfiledTiles: ("mxfp4.t2.h64.i96.e2.k2.default.swiglu exact", "mxfp4.t2.h64.i128.e2.k2.default.silu real"),
}


@pytest.mark.parametrize("twin", CLEAN, ids=lambda twin: twin.__name__)
def test_what_a_fault_breaks_is_right_without_it(twin: type[Twin]) -> None:
    for text in CLEAN[twin]:
        case, fill = text.split()
        verdict = run(Case.parse(f"moe.{case}.standard.{fill}.s0"), twin.backend("clean"), CPU, options=Options(1))
        assert verdict.status is Status.PASSED, f"{verdict.case_id}: {verdict.reason}"
