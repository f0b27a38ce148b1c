"""The 8x4 scale swizzle of the low-latency kernels: 32-byte tiles of 8 rows x 4 columns, row-major inside.

offset(r, c) = ((r // 8) * T + c // 4) * 32 + (r % 8) * 4 + c % 4, T = ceil(columns / 4). Padding bytes are 0.
Source: FlashInfer SfLayout.layout_8x4.
"""

from __future__ import annotations

from reference.layout import REST, Tiling, tiled

TILING = Tiling(split=((REST, 8), (REST, 4)), order=(0, 2, 1, 3), merge=(4,))

LAYOUTS = (tiled("swizzle_8x4", TILING, "FlashInfer SfLayout.layout_8x4", pad=(8, 4)),)
