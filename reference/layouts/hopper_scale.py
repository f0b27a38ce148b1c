"""triton_kernels HopperMXScaleLayout, on logical scales [N, K / 32]: tiles of 32 * num_warps rows.

N is padded to 32 * num_warps, scale columns to 2 (vLLM pads them to 4 beforehand, because the kernel reads whole K
tiles). Memory is [N / 32, 32 * columns]; the library shows it transposed.
With n = block, a, w, b, e (2, num_warps, 2, 8) and k = k // 2, k % 2: memory order block, w, k // 2, a, e, k % 2, b.
"""

from __future__ import annotations

from reference.layout import REST, Layout, Tiling, tiled

SOURCE = "triton_kernels tensor_details/layout_details/hopper_scale.py"


def hopper_scale(num_warps: int, column_pad: int = 2) -> Layout:
    """`num_warps` 4 or 8; `column_pad` 2 (triton_kernels) or 4 (vLLM #47910)."""
    tiling = Tiling(split=((REST, 2, num_warps, 2, 8), (REST, 2)), order=(0, 2, 5, 1, 4, 6, 3), merge=(2, 5))
    name = f"hopper_scale_w{num_warps}_k{column_pad}"
    return tiled(name, tiling, SOURCE, pad=(32 * num_warps, column_pad))


LAYOUTS = tuple(hopper_scale(warps, pad) for warps in (4, 8) for pad in (2, 4))
