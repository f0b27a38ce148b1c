"""FlashInfer's helpers that lay weights out for trtllm-gen, on any machine: its own want CUDA, or a second to be imported.

suites/selftest/test_witness_layouts.py holds the layouts against the library's helpers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reference.layouts import gated_reorder, trtllm_row_shuffle, trtllm_scale_shuffle
from reference.layouts.block_major_k import block_major_k

GATED = gated_reorder.LAYOUTS[0]


def reorder_rows_for_gated_act_gemm(x: Tensor) -> Tensor:
    """[up; gate] rows -> up 0, gate 0, up 1, gate 1, ..."""
    return GATED.pack(x)


def shuffle_matrix_a(input_tensor: Tensor, epilogue_tile_m: int) -> Tensor:
    """[rows, columns] with the rows of every block of 16 or 32 in the order of the MMA's fragments."""
    return trtllm_row_shuffle.row_shuffle(trtllm_row_shuffle.block_rows(epilogue_tile_m)).pack(input_tensor)


def shuffle_matrix_sf_a(input_tensor: Tensor, epilogue_tile_m: int, num_elts_per_sf: int = 16) -> Tensor:
    """Linear scales [rows, blocks], uint8 or bf16, with the rows of their weights, in the 128x4 interleave; flat."""
    assert input_tensor.dtype in (torch.uint8, torch.bfloat16)
    assert num_elts_per_sf in (16, 32)
    assert input_tensor.shape[0] % 128 == 0
    return trtllm_scale_shuffle.scale_shuffle(trtllm_row_shuffle.block_rows(epilogue_tile_m)).pack(input_tensor)


def convert_to_block_layout(input_tensor: Tensor, blockK: int) -> Tensor:
    """[rows, columns] -> [columns / blockK, rows, blockK]."""
    assert input_tensor.shape[1] % blockK == 0, "K must be divisible by blockK"
    return block_major_k(blockK).pack(input_tensor)


ENTRIES = {
    "flashinfer.reorder_rows_for_gated_act_gemm": reorder_rows_for_gated_act_gemm,
    "flashinfer.shuffle_matrix_a": shuffle_matrix_a,
    "flashinfer.shuffle_matrix_sf_a": shuffle_matrix_sf_a,
    "flashinfer.fused_moe.convert_to_block_layout": convert_to_block_layout,
}
