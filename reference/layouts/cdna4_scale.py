"""triton_kernels CDNA4 (gfx950) scales, on logical [N, K / 32]: tiles of 32 rows x 8 columns.

In the storage row n // 32: ((((k // 8) * 4 + k % 4) * 16 + n % 16) * 2 + k % 8 // 4) * 2 + n % 32 // 16.
N is padded to 32 and columns to 8 in new versions; old ones refuse other shapes. Memory is [N / 32, 32 * columns].
"""

from __future__ import annotations

from reference.layout import REST, Tiling, tiled

SOURCE = "triton_kernels tensor_details/layout_details/cdna4_scale.py"
TILING = Tiling(split=((REST, 2, 16), (REST, 2, 4)), order=(0, 3, 5, 2, 4, 1), merge=(1, 5))

LAYOUTS = (
    tiled("cdna4_scale", TILING, SOURCE, pad=(32, 8)),
    tiled("cdna4_scale_unpadded", TILING, SOURCE, multiple=(32, 8)),
)
