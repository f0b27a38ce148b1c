"""Marlin's scale permutation: [N, K / g] -> [K / g, N], columns permuted inside runs of 64 or 32.

Grouped (uint4b8): column 8 i + j of a run of 64 is n = i + 8 j. FP4 (nvfp4, mxfp4) then swaps the middle two of every
four. Single (one group, or 8-bit activations): column 8 i + 2 a + b of a run of 32 is n = 8 a + 2 i + b.
nvfp4 stores e4m3 code c >= 8 as byte c + 120 (no sign, 5 exponent bits); smaller ones need vLLM's scale factor first.
N % 64 == 0 (% 32 single): pad scales with the weights. Source: vLLM marlin_permute_scales, mxfp4_marlin_process_scales.
"""

from __future__ import annotations

from reference.layout import REST, Tiling, tiled

SOURCE = "vLLM marlin_utils.marlin_permute_scales"
FP4_SOURCE = f"{SOURCE}, marlin_utils_fp4.{{nvfp4,mxfp4}}_marlin_process_scales"

GROUPED = Tiling(split=((REST, 8, 8), (REST,)), order=(3, 0, 2, 1), merge=(1, 3))
FP4 = Tiling(split=((REST, 2, 2, 2, 8), (REST,)), order=(5, 0, 4, 1, 3, 2), merge=(1, 5))
SINGLE = Tiling(split=((REST, 4, 4, 2), (REST,)), order=(4, 0, 2, 1, 3), merge=(1, 4))

LAYOUTS = (
    tiled("marlin_scale_grouped", GROUPED, SOURCE, multiple=(64, 1)),
    tiled("marlin_scale_fp4", FP4, FP4_SOURCE, multiple=(64, 1)),
    tiled("marlin_scale_single", SINGLE, SOURCE, multiple=(32, 1)),
)
