"""The halves of a gated weight in turn, g rows at a time: [first 0..g), [second 0..g), [first g..2g), ...

Row i of the first half goes to (i // g) * 2 g + i % g, row i of the second half g further. Which half is the gate is the
library's business. rows % 2 g == 0; nothing is padded. g = 64: CuTe-DSL; 32: SM90 gather GEMM; 16, 8: mega-MoE kernels.
"""

from __future__ import annotations

from reference.layout import REST, Layout, Tiling, tiled

SOURCES = {
    64: "FlashInfer prepare._interleave_linear_and_gate",
    32: "FlashInfer interleave_up_gate_sm90 (after swapping its gate-first halves)",
    16: "FlashInfer mega-MoE _interleave_gate_up_16",
    8: "FlashInfer alphamoe_interleave_gated_weights",
}


def gated_interleave(rows: int, source: str = "") -> Layout:
    """[2 n, columns] -> the same shape, halves interleaved `rows` rows at a time."""
    tiling = Tiling(split=((2, REST, rows), (REST,)), order=(1, 0, 2, 3), merge=(3, 1))
    return tiled(f"gated_interleave_{rows}", tiling, source, multiple=(2 * rows, 1))


LAYOUTS = tuple(gated_interleave(rows, source) for rows, source in SOURCES.items())
