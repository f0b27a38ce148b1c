"""SM90 mixed-input GEMM, fp4 weights consumed as fp8: the byte move of int4, then signs gathered on bits 7 and 3.

In each 32-bit word (row r low half, row r + 8 high half) exponent and mantissa bits stay. The sign of code n (bit
4 n + 3) goes to the high nibble of byte n for n < 4, to the low nibble of byte n - 4 otherwise.
Source: FlashInfer csrc moe_gemm_mixed_utils.cu, preprocess_fp4x8_signs_for_fp8.
"""

from __future__ import annotations

from reference.layout import tiled, twiddled
from reference.layouts.sm90_weight_int4 import MULTIPLE, TILING

SOURCE = "FlashInfer interleave_moe_weights_for_sm90_mixed_gemm, quant_type fp4_fp8"
SIGNS = {3: 7, 7: 15, 11: 23, 15: 31, 19: 3, 23: 11, 27: 19, 31: 27}
BITS = tuple(SIGNS.get(bit, bit) for bit in range(32))

LAYOUTS = (twiddled(tiled("", TILING, SOURCE, multiple=MULTIPLE), "sm90_weight_fp4_fp8", BITS),)
