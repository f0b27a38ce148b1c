"""The five reports that the project was built from: vllm#38169, #38251, #39315, #41711 and #38504."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harness.verdict import Status, Verdict

Check = Callable[..., None]
SMALL = "moe.{}.t5.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0"
DECODE = "moe.nvfp4.t1.h96.i160.e4.k1.renormalize.silu.standard.exact.hot.s0"
MXINT4 = "moe.mxint4.t16.h160.i32.e16.k3.deepseek_v3.swiglu.standard.real.hot.s0"


def test_38169_an_output_on_another_device_never_reaches_the_kernel(judge: Callable[..., Verdict]) -> None:
    """A host tensor as `out`: a coredump where the GPU cannot reach host memory, in code that was not to blame."""
    verdict = judge(SMALL.format("bf16"), "out_on_another_device", 0)
    assert verdict.status is Status.CONTRACT
    assert verdict.reason.startswith("out is on meta, the kernel runs on cpu: it would write")
    assert judge(SMALL.format("bf16"), "out_on_its_device", 0).status is Status.PASSED


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("B001_out_rebound_locally", "elements of the caller's out buffer were never written"),
        ("B001_out_left_permuted", "never written, or copied from there"),
    ],
)
def test_38169_the_callers_out_buffer_holds_the_result(stays_dead: Check, fault: str, says: str) -> None:
    stays_dead(fault, "vllm/pull/38169", SMALL.format("bf16"), Status.WRONG, says, None)


@pytest.mark.parametrize(
    ("fault", "says"),
    [("B002_jit_header_missing", "cublasLt.h"), ("B002_warp_illegal_address_aborts", "killed by SIGABRT during launch")],
)
def test_38251_relanded_and_died_again(stays_dead: Check, fault: str, says: str) -> None:
    """vllm#39129, #39139: the second landing of the CuteDSL experts crashed the same job."""
    stays_dead(fault, "vllm/pull/39139", DECODE, Status.CRASHED, says)


@pytest.mark.parametrize(
    ("fault", "says"),
    [("B003_list_for_tensor", "returned list, wanted a tensor"), ("B003_pdl_lands_on_do_finalize", "returned shape (48, 160)")],
)
def test_39315_an_argument_in_the_middle_changes_what_comes_back(stays_dead: Check, fault: str, says: str) -> None:
    stays_dead(fault, "vllm/pull/39315", MXINT4, Status.MALFORMED, says)


@pytest.mark.parametrize("fault", ["B004_global_scale_of_first_expert", "B004_global_scales_by_row"])
def test_41711_a_global_scale_is_one_per_expert(stays_dead: Check, fault: str) -> None:
    stays_dead(fault, "vllm/pull/41711", SMALL.format("nvfp4"), Status.WRONG, "elements beyond the bound")


def test_38504_id_minus_one_sets_no_bit(stays_dead: Check) -> None:
    """-1 / 32 is 0 in C and -1 in Python: expert 31 got the slots of other ranks."""
    case = "moe.bf16.t17.h64.i32.e33.k8.sigmoid.swiglu.standard.real.s0"
    stays_dead("B005_truncated_division_sets_bit31", "vllm/pull/38504", case, Status.CRASHED, "illegal memory access", None)
