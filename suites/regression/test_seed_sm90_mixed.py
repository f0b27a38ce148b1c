"""vllm#41711: FlashInfer 0.6.8 -> 0.6.11 moved the SM90 MXFP4 interleave into two helpers; 0.6.16 changed its fold."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harness.verdict import Status, Verdict

Judge = Callable[..., Verdict]
CASE = "moe.mxfp4.t5.h256.i128.e4.k2.renormalize.swiglu.standard.{}.s0"
each_fill = pytest.mark.parametrize("fill", ["real", "exact"])


@each_fill
@pytest.mark.parametrize("subject", ["w4a16_raw_weights", "w4a16_raw_scales"])
def test_41711_what_is_not_interleaved_is_wrong(judge: Judge, subject: str, fill: str) -> None:
    """Nothing crashed and every value was finite: the model's answers were all wrong."""
    verdict = judge(CASE.format(fill), subject, 0)
    assert verdict.status is Status.WRONG
    assert verdict.comparison is not None
    assert verdict.comparison.nonfinite == 0
    assert judge(CASE.format(fill), "flashinfer_cutlass_w4a16_twin", 0).status is Status.PASSED


@each_fill
@pytest.mark.parametrize("subject", ["w4a16_old_fold_new_kernel", "w4a16_new_fold_old_kernel"])
def test_41711_scales_folded_for_another_release_are_wrong(judge: Judge, subject: str, fill: str) -> None:
    """flashinfer#3738, #4411: the same call gives other numbers on a patch release; a shape check of the bytes says nothing."""
    assert judge(CASE.format(fill), subject, 0).status is Status.WRONG
    assert judge(CASE.format(fill), "w4a16_old_fold_old_kernel", 0).status is Status.PASSED


def test_41711_unfolded_scales_never_reach_the_kernel(judge: Judge) -> None:
    verdict = judge(CASE.format("real"), "w4a16_unshaped_scales", 0)
    assert verdict.status is Status.CONTRACT
    assert verdict.reason.startswith("fc1_scales has shape (4, 256, 8), wanted (4, 2, 1024)")
