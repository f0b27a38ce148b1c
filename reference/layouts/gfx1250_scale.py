"""triton_kernels GFX1250 scales, on logical [N, K / 32]: tiles of 128 rows x w columns, w = min(4, columns).

The 128x4 atom, but narrower when there are fewer than 4 columns. N is padded to 128, columns to w.
Memory is [N / 128, 128 * columns]; the library shows it transposed.
"""

from __future__ import annotations

from torch import Tensor

from reference.layout import REST, Layout, Shape, Tiling, crop, pad_to, rounded

SOURCE = "triton_kernels tensor_details/layout_details/gfx1250_scale.py"


def tiling(columns: int) -> Tiling:
    """The tiles of a matrix with `columns` scale columns."""
    return Tiling(split=((REST, 4, 32), (REST, min(4, columns))), order=(0, 3, 2, 1, 4), merge=(1, 4))


def padding(shape: Shape) -> Shape:
    """[rows, columns] rounded up to whole tiles."""
    return rounded(128, min(4, shape[1]))(shape)


def swizzle(scales: Tensor) -> Tensor:
    """[rows, columns] -> [padded rows / 128, 128 * padded columns]."""
    return tiling(scales.shape[1]).store(pad_to(scales, padding(tuple(scales.shape))))


def unswizzle(stored: Tensor, shape: Shape) -> Tensor:
    """Inverse of `swizzle`."""
    return crop(tiling(shape[1]).load(stored, padding(shape)), shape)


LAYOUTS = (Layout("gfx1250_scale", swizzle, unswizzle, padding, SOURCE),)
