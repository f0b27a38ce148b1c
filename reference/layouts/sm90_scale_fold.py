"""SM90 mixed-input GEMM, weight scales: every 64 rows x 128 elements fold to rows of 16 bytes.

[rows, K / g] -> [rows / 64, K / 128, m, 16 B], with n = 128 / g scales per row and K block, m = 64 / (16 B / n):
element (r, k) -> [r // 64, k // n, r % 64 % m, (r % 64 // m) * n + k % n]. Nothing is padded.
Source: FlashInfer interleave_moe_scales_for_sm90_mixed_gemm.
"""

from __future__ import annotations

from reference.layout import REST, Layout, Tiling, tiled

SOURCE = "FlashInfer interleave_moe_scales_for_sm90_mixed_gemm"


def scale_fold(group: int, itemsize: int) -> Layout:
    """Scales of `itemsize` bytes, one per `group` elements of K."""
    per_block = 128 // group
    slices = 16 // itemsize // per_block
    tiling = Tiling(split=((REST, slices, 64 // slices), (REST, per_block)), order=(0, 3, 2, 1, 4), merge=(1, 1, 1, 2))
    return tiled(f"sm90_scale_fold_g{group}_b{itemsize}", tiling, SOURCE, multiple=(64, per_block))


LAYOUTS = (scale_fold(32, 1), scale_fold(128, 2))  # MXFP4 e8m0 bytes; W4A8 bfloat16
