"""Historical crashes, hangs and scribbles stay dead: planted again, each is caught at a named case, with its own status."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harness.verdict import Status

ONE = "moe.mxfp4.t1.h64.i32.e1.k1.default.swiglu.standard.exact.s0"
MANY = "moe.fp16.t16.h64.i96.e33.k8.sigmoid.swiglu_oai.standard.real.s0"
RANKS = "moe.bf16.t33.h160.i160.e5.k2.minimax2.swiglu_oai.standard.real.s0"
GROUPS = "moe.mxint4.t16.h160.i32.e16.k3.deepseek_v3.swiglu.standard.real.hot.s0"
DECODE = "moe.nvfp4.t1.h96.i160.e4.k1.renormalize.silu.standard.exact.hot.s0"
BATCH = "moe.mxfp4.t33.h64.i32.e4.k2.renormalize.swiglu.standard.exact.s0"
CACHED = "moe.fp32.t15.h64.i32.e1.k1.sigmoid.swiglu.standard.exact.s0"

CRASHES = (
    ("B007_expert_ids_tail_zero", "vllm/pull/35161", MANY, "illegal memory access"),
    ("B024_swizzle_unpadded", "vllm/pull/23140", DECODE, "shape '[4, 160, 6]' is invalid"),
    ("B027_capacity_not_rounded", "vllm/pull/27311", MANY, "illegal memory access"),
    ("B028_grid_forgets_no_adapter", "vllm/pull/40131", MANY, "illegal memory access"),
    ("B032_sentinel_indexes_expert_map", "vllm/pull/42034", RANKS, "out of bounds for dimension 0"),
    ("B040_padding_scales_unwritten", "vllm/pull/49784", ONE, "device-side assert: a scale is not a power of two"),
    ("B050_simulated_ids_int64", "vllm/pull/38352", RANKS, "Check failed: expertsIds.dtype() == dl_int32"),
    ("B062_runner_reads_one_output_class", "sglang/issues/29849", DECODE, "AttributeError"),
    ("B073_packer_asserts_int32", "sglang/pull/32882", ONE, "topk_ids must be int32"),
    ("B074_placement_map_int64", "sglang/pull/25380", MANY, "expected int32, got int64"),
    ("B078_align_kernel_does_nothing", "sglang/issues/30245", MANY, "illegal memory access"),
    ("B082_stride_from_own_tokens", "sglang/pull/27945", RANKS, "out of bounds for dimension 0"),
    ("B106_dummy_scales_unpadded", "flashinfer/issues/3558", ONE, "illegal memory access"),
    ("B107_skipped_tactic_was_launched", "flashinfer/issues/4049", ONE, "an illegal instruction was encountered"),
    ("B112_default_routing_missing", "flashinfer/pull/2889", ONE, "unsupported routing method type: Default"),
    ("B114_invalid_score_is_zero", "flashinfer/issues/2168", GROUPS, "index 16 is out of bounds"),
    ("B129_few_experts_refused", "flashinfer/pull/2451", GROUPS, "expects at least 22 experts"),
    ("B142_offsets_prefetched", "pytorch/issues/163462", ONE, "illegal memory access"),
    ("B155_queue_overrun", "DeepEP/issues/427", RANKS, "out of bounds for dimension 0"),
    ("B185_tail_padding_from_one", "llama.cpp/issues/27792", ONE, "illegal memory access"),
    ("B187_asserts_one_token", "llama.cpp/pull/20323", BATCH, "killed by SIGABRT during launch"),
    ("B193_expert_offset_overflows", "Liger-Kernel/issues/1296", GROUPS, "illegal memory access"),
    ("B203_padding_lanes_counted", "Triton-distributed/issues/181", ONE, "illegal memory access"),
)
HANGS = (
    (
        "B127_cluster_never_completes",
        "flashinfer/issues/4814",
        BATCH,
        "no answer within 2 s: it runs Python code at gemm_state.py",
    ),
    (
        "B184_capacity_from_own_tokens",
        "DeepSpeed/issues/6809",
        RANKS,
        "no answer within 2 s: it runs Python code at ranks_geometry.py",
    ),
)
SCRIBBLES = (
    ("B018_inplace_overwrites_tokens", "vllm/pull/28942", MANY, "the call changed its input x"),
    ("B220_workspace_returned", "Diffulex/pull/37", CACHED, "overwrote the tensor that an earlier call had returned"),
)
RELATED = ("B106_dummy_scales_unpadded", "B220_workspace_returned")  # another tactic, another call shows them
OF = {Status.CRASHED: CRASHES, Status.HUNG: HANGS, Status.CORRUPTING: SCRIBBLES}
PAST = [(status, *bug) for status, bugs in OF.items() for bug in bugs]


@pytest.mark.parametrize(("status", "fault", "thread", "case", "says"), PAST, ids=[bug[1] for bug in PAST])
def test_it_is_caught_at_its_case(
    stays_dead: Callable[..., None], status: Status, fault: str, thread: str, case: str, says: str
) -> None:
    stays_dead(fault, thread, case, status, says, None if fault in RELATED else 0)
