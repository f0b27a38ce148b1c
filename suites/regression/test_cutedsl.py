"""vllm#38169, #38251 and #41711 where they happened: the CuTe-DSL adapters, over the twins of the library's functions.

The verdicts are the generic suite's; a defect is planted in one of the library's functions or in what `prepare` packed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from harness.backends import discover
from harness.backends.base import CPU, Backend, Launch
from harness.backends.flashinfer_cutedsl import INTERLEAVE, NVFP4
from harness.backends.flashinfer_cutedsl_masked import GEMMS, prepare
from harness.case import Case
from harness.entry import planted, twins
from harness.inputs import Inputs
from harness.pipeline import Options, run
from harness.verdict import Status, Verdict
from reference.layout import pad_to
from reference.layouts import get as layout

CONVERT = "flashinfer.cute_dsl.utils.convert_sf_to_mma_layout"
MASKED, FUSED = (discover()[f"flashinfer_cutedsl{name}_twin"] for name in ("_masked", "_two_stage"))
BATCHED = "moe.nvfp4-nvfp4.t9.h160.i96.e4.k2.renormalize.swiglu.batched.{}.s0"
HOT = "moe.nvfp4-nvfp4.t9.h160.i96.e16.k1.renormalize.swiglu.batched.exact.hot.s0"  # one expert full, most without a row
STANDARD = "moe.nvfp4-nvfp4.t9.h128.i128.e4.k2.renormalize.swiglu.standard.{}.s0"
FILLS = ("exact", "real")
HIDDEN = 160
Change = Callable[[dict[str, Tensor]], None]


def judged(backend: Backend, case: str) -> Verdict:
    return run(Case.parse(case), backend, CPU, options=Options(checks=0))


def packed_otherwise(backend: Backend, change: Change) -> Backend:
    """The backend with `change` made to the buffers that its `prepare` packed."""

    def bad(case: Case, inputs: Inputs) -> Launch:
        launch = backend.prepare(case, inputs)
        change(cast(dict[str, Tensor], launch.buffers))
        return launch

    return replace(backend, name="packed_otherwise", prepare=bad)


@pytest.mark.parametrize("case", [BATCHED.format("exact"), BATCHED.format("real"), HOT])
def test_the_masked_pipeline_passes(case: str) -> None:
    assert judged(MASKED, case).status is Status.PASSED


@pytest.mark.parametrize("fill", FILLS)
def test_the_fused_layer_passes(fill: str) -> None:
    assert judged(FUSED, STANDARD.format(fill)).status is Status.PASSED


def test_38169_an_out_on_another_device_is_named_before_gemm_2() -> None:
    """The test allocated it on the host: it died in the next kernel, in code that was not to blame."""

    def elsewhere(*size: Any, **given: Any) -> Tensor:
        return torch.empty(*size, **{**given, "device": "meta"})

    verdict = judged(replace(MASKED, name="elsewhere", prepare=partial(prepare, empty=elsewhere)), BATCHED.format("real"))
    assert verdict.status is Status.CONTRACT
    assert verdict.reason.startswith("out is on meta, the kernel runs on cpu: it would write")


@pytest.mark.parametrize("fill", FILLS)
def test_38169_gemm_2_re_binds_out_and_the_callers_buffer_stays_unwritten(fill: str) -> None:
    """`out = out.permute(...)` of something that is no view any more: the product lands in a copy."""
    gemm = twins()[GEMMS[0]]

    def rebinding(lhs: Any, rhs: Any, out: Tensor, masked_m: Tensor, **given: Any) -> Tensor:
        if out.shape[1] == HIDDEN:
            out = out.permute(2, 0, 1).clone().permute(1, 2, 0)
        return cast(Tensor, gemm(lhs, rhs, out, masked_m, **given))

    verdict = judged(planted(MASKED, "rebinding", {GEMMS[0]: rebinding}), BATCHED.format(fill))
    assert verdict.status is Status.WRONG
    assert verdict.diagnosis is not None
    assert verdict.diagnosis.kind == "never_written"


def without_interleave(b: dict[str, Tensor]) -> None:
    """up rows above gate rows, as for the other FlashInfer kernels."""
    rewrite(b, lambda rows: INTERLEAVE.unpack(rows, tuple(rows.shape)))


def gate_first(b: dict[str, Tensor]) -> None:
    """Interleaved, but the gate's 64 rows first."""
    rewrite(b, lambda rows: INTERLEAVE.pack(INTERLEAVE.unpack(rows, tuple(rows.shape)).roll(rows.shape[1] // 2, 1)))


def rewrite(b: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> None:
    """The rows of w1 and of its scales, in place."""
    view, (experts, rows, half) = layout("mma_6d_view"), b["w1_weight"].shape
    scales = view.unpack(b["w1_weight_sf"], (experts, rows, half // 8))
    b["w1_weight"].copy_(change(b["w1_weight"].clone()))
    b["w1_weight_sf"].copy_(view.pack(change(scales)))


@pytest.mark.parametrize("change", [without_interleave, gate_first])
@pytest.mark.parametrize("fill", FILLS)
def test_38251_rows_of_w1_in_another_order_are_seen(change: Change, fill: str) -> None:
    """Random weights against a reference in the same order would not."""
    verdict = judged(packed_otherwise(FUSED, change), STANDARD.format(fill))
    assert verdict.status is Status.WRONG, verdict.reason


@pytest.mark.parametrize("backend", [MASKED, FUSED])
@pytest.mark.parametrize("fill", FILLS)
def test_38251_weight_scales_that_were_not_swizzled_are_seen(backend: Backend, fill: str) -> None:
    """The bytes have the right number: the view is made of row-major ones."""
    convert, swizzle = twins()[CONVERT], layout("swizzle_128x4_per_expert")

    def linear(sf: Tensor, m: int, k: int, num_groups: int = 1, sf_vec_size: int = 16) -> Tensor:
        rows = swizzle.unpack(sf.view(num_groups, -1), (num_groups, m, k // sf_vec_size))
        padded = pad_to(rows, swizzle.padded_shape(tuple(rows.shape)))
        return cast(Tensor, convert(padded.flatten(), m, k, num_groups, sf_vec_size))

    case = (BATCHED if backend is MASKED else STANDARD).format(fill)
    verdict = judged(planted(backend, "linear", {CONVERT: linear}), case)
    assert verdict.status is Status.WRONG, verdict.reason


@pytest.mark.parametrize("fill", FILLS)
def test_38251_swizzled_scales_of_x_where_linear_ones_are_read_are_seen(fill: str) -> None:
    fused, swizzle = twins()[NVFP4], layout("swizzle_128x4")

    def swizzled(**given: Any) -> Tensor:
        rows = swizzle.pack(given["x_sf"])[: given["x_sf"].numel()].view(given["x_sf"].shape)
        return cast(Tensor, fused(**{**given, "x_sf": rows}))

    verdict = judged(planted(FUSED, "swizzled", {NVFP4: swizzled}), STANDARD.format(fill))
    assert verdict.status is Status.WRONG, verdict.reason


@pytest.mark.parametrize(
    ("backend", "name", "count", "says"),
    [
        (MASKED, "a1_gscale", 1, "a_global_sf has shape (1,), wanted (experts 4)"),
        (MASKED, "a2_gscale", 1, "a_global_sf has shape (1,), wanted (experts 4)"),
        (FUSED, "fc2_input_scale", 4, "fc2_input_scale has shape (4,), wanted (1)"),
    ],
)
def test_41711_a_global_scale_of_the_wrong_count_is_named(backend: Backend, name: str, count: int, says: str) -> None:
    """One value where a grouped quantiser reads one an expert, one an expert where another reads the first."""

    def change(b: dict[str, Tensor]) -> None:
        b[name] = torch.full((count,), float(b[name][0]))

    case = (BATCHED if backend is MASKED else STANDARD).format("real")
    verdict = judged(packed_otherwise(backend, change), case)
    assert verdict.status is Status.CONTRACT, verdict.reason
    assert says in verdict.reason
