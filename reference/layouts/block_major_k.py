"""BlockMajorK weights: [rows, K bytes] -> [K bytes / b, rows, b], with b counted in bytes whatever the element width.

b = 128; some MXFP4 kernels also take 64. K bytes % b == 0; nothing is padded. Source: FlashInfer convert_to_block_layout.
"""

from __future__ import annotations

from reference.layout import REST, Layout, Tiling, tiled


def block_major_k(width: int) -> Layout:
    """[rows, bytes] -> [bytes / width, rows, width]."""
    tiling = Tiling(split=((REST,), (REST, width)), order=(1, 0, 2), merge=(1, 1, 1))
    return tiled(f"block_major_k_{width}", tiling, "FlashInfer convert_to_block_layout", multiple=(1, width))


LAYOUTS = (block_major_k(128), block_major_k(64))
