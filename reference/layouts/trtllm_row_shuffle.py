"""TRT-LLM's shuffleMatrixA: inside every block of b rows, row 8 y + x of the result is row (b / 8) x + y of the matrix.

b = 32 if the epilogue tile has a multiple of 128 rows, else 16. Weights (rows of bytes), linear scales and bias vectors
use the same row order. rows % b == 0; nothing is padded. Source: FlashInfer shuffle_matrix_a.
"""

from __future__ import annotations

from reference.layout import REST, Layout, Tiling, tiled


def block_rows(epilogue_tile: int) -> int:
    """The block b for a kernel whose epilogue tile has `epilogue_tile` rows (128 for FP4, 64 for DeepSeek FP8)."""
    return 32 if epilogue_tile % 128 == 0 else 16


def row_shuffle(block: int) -> Layout:
    """[rows, columns] -> the same shape, rows permuted inside blocks of `block` (16 or 32)."""
    tiling = Tiling(split=((REST, 8, block // 8), (REST,)), order=(0, 2, 1, 3), merge=(3, 1))
    return tiled(f"trtllm_row_shuffle_{block}", tiling, "FlashInfer shuffle_matrix_a", multiple=(block, 1))


LAYOUTS = (row_shuffle(16), row_shuffle(32))
