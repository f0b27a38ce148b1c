"""TRT-LLM's gated reorder: the two halves of a gated weight, row by row in turn.

out[2 i] = in[i], out[2 i + 1] = in[rows / 2 + i]; in = [up; gate] gives up 0, gate 0, up 1, ... Applied before the row
shuffle. rows % 2 == 0; nothing is padded. Source: FlashInfer reorder_rows_for_gated_act_gemm.
"""

from __future__ import annotations

from reference.layout import REST, Tiling, tiled

TILING = Tiling(split=((2, REST), (REST,)), order=(1, 0, 2), merge=(2, 1))

LAYOUTS = (tiled("gated_reorder", TILING, "FlashInfer reorder_rows_for_gated_act_gemm", multiple=(2, 1)),)
