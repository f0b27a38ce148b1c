"""SM90 mixed-input GEMM, int4 weights: 16-bit units of rows r and r + 8 paired inside 16-row, 64-element blocks.

Unit l (0..15, two bytes) of a 32-byte partition p of row r goes to row (r // 16 * 16 + r % 8) + 8 * ((l % 8) >= 4),
unit column 16 p + (l // 8) * 8 + (l % 4) * 2 + (r % 16) // 8. rows % 16 == 0 and bytes % 32 == 0; nothing is padded.
Source: FlashInfer csrc moe_gemm_mixed_utils.cu, interleave_int4_weights_for_sm90_mixed_gemm.
"""

from __future__ import annotations

from reference.layout import REST, Tiling, tiled

#                rows: block, row half, row     bytes: half partition, l % 8 // 4, l % 4, byte
TILING = Tiling(split=((REST, 2, 8), (REST, 2, 4, 2)), order=(0, 4, 2, 3, 5, 1, 6), merge=(3, 4))
MULTIPLE = (16, 32)
SOURCE = "FlashInfer interleave_moe_weights_for_sm90_mixed_gemm, quant_type int4"

LAYOUTS = (tiled("sm90_weight_int4", TILING, SOURCE, multiple=MULTIPLE),)
