"""Subjects of test_seed_sm90_mixed: the MXFP4 x bf16 adapter of FlashInfer's SM90 mixed-input GEMM with a layout helper, or the
kernel, of another release in the place of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from harness.backends import with_twins
from harness.backends.flashinfer_cutlass import BACKENDS as CUTLASS
from harness.backends.flashinfer_cutlass import ENTRY, SCALES, WEIGHTS
from harness.entry import planted, twins

CLEAN = next(b for b in with_twins(CUTLASS) if b.name == "flashinfer_cutlass_w4a16_twin")


def raw_weights(weight: Tensor, quant_type: str = "fp4") -> Tensor:
    """No interleave at all: flashinfer#3334, "forgetting it is silent garbage"."""
    return weight.clone()


def raw_scales(scales: Tensor, group_size: int = 32) -> Tensor:
    """Row-major scales in the shape of folded ones."""
    experts, rows, blocks = scales.shape
    return scales.reshape(experts, rows // 64, blocks // 4, 16, 16).clone()


def unshaped_scales(scales: Tensor, group_size: int = 32) -> Tensor:
    """Row-major scales as the checkpoint has them."""
    return scales.clone()


def fold_of_0_6_15(scales: Tensor, group_size: int = 32) -> Tensor:
    """[experts, K / 128, rows * 4]: the helper of FlashInfer 0.6.10 .. 0.6.15, and 0.6.16.post3 .. 0.6.17."""
    experts, rows, blocks = scales.shape
    by_block = scales.reshape(experts, rows, blocks // 4, 4).permute(0, 2, 1, 3)
    return by_block.reshape(experts, blocks // 4, rows * 4).contiguous()


def kernel_of_0_6_15(**arguments: Any) -> Any:
    """The kernel that reads that fold: whatever it is handed is read as such."""
    rows = (arguments["fc1_expert_weights"].shape[1], arguments["fc2_expert_weights"].shape[1])
    refolded = []
    for stored, high in zip(arguments["quant_scales"], rows, strict=True):
        experts = len(stored)
        by_block = stored.reshape(experts, -1, high, 4).permute(0, 2, 1, 3)
        refolded.append(twins()[SCALES](by_block.reshape(experts, high, -1), 32))
    return twins()[ENTRY](**{**arguments, "quant_scales": refolded})


BACKENDS = (
    planted(CLEAN, "w4a16_raw_weights", {WEIGHTS: raw_weights}),
    planted(CLEAN, "w4a16_raw_scales", {SCALES: raw_scales}),
    planted(CLEAN, "w4a16_unshaped_scales", {SCALES: unshaped_scales}),
    planted(CLEAN, "w4a16_old_fold_new_kernel", {SCALES: fold_of_0_6_15}),
    planted(CLEAN, "w4a16_new_fold_old_kernel", {ENTRY: kernel_of_0_6_15}),
    planted(CLEAN, "w4a16_old_fold_old_kernel", {SCALES: fold_of_0_6_15, ENTRY: kernel_of_0_6_15}),
)
