"""SM90 mixed-input GEMM, fp4 weights (MXFP4 W4A16): four bytes of rows r and r + 8 to one word, then its bits twiddled.

Byte c of a 32-byte partition p, with mma = c // 8: the word at row (r // 16 * 16 + r % 8) + 8 * (mma % 2), byte
32 p + 16 * (mma // 2) + 4 * (c % 4); in it byte 2 * (c % 8 // 4) + (r % 16) // 8. The twiddle is Hopper value's.
rows % 16 == 0 and bytes % 32 == 0; nothing is padded. Source: FlashInfer csrc moe_gemm_mixed_utils.cu.
"""

from __future__ import annotations

from reference.layout import REST, Tiling, tiled, twiddled
from reference.layouts.hopper_value import BITS

#                rows: block, row half, row     bytes: half partition, mma % 2, c % 8 // 4, c % 4
TILING = Tiling(split=((REST, 2, 8), (REST, 2, 2, 4)), order=(0, 4, 2, 3, 6, 5, 1), merge=(3, 4))
SOURCE = "FlashInfer interleave_moe_weights_for_sm90_mixed_gemm, quant_type fp4"

LAYOUTS = (twiddled(tiled("", TILING, SOURCE, multiple=(16, 32)), "sm90_weight_fp4", BITS),)
