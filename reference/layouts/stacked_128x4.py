"""128x4 swizzles of a stack of scale matrices [groups, rows, columns]: each group by itself, or all rows as one matrix.

The two hold the same bytes only if rows % 128 == 0: otherwise a tile of the joint swizzle takes in rows of two groups.
Gated weights whose halves are aligned each (CUTLASS) are the first kind with 2 * experts groups.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from reference.layout import Layout, Shape, per_expert
from reference.layouts import swizzle_128x4

SOURCE = "FlashInfer block_scale_interleave of a 3-D tensor, nvfp4_batched_quantize"
JOINT_SOURCE = "FlashInfer fp4_quantize of a stack viewed as [groups * rows, K]"


def swizzle_joint(scales: Tensor) -> Tensor:
    """[groups, rows, columns] -> flat: one 128x4 swizzle of [groups * rows, columns]."""
    return swizzle_128x4.swizzle(scales.flatten(0, 1))


def unswizzle_joint(flat: Tensor, shape: Shape) -> Tensor:
    """Inverse of `swizzle_joint`."""
    groups, rows, columns = shape
    return swizzle_128x4.unswizzle(flat, groups * rows, columns).reshape(shape)


def joint_padding(shape: Shape) -> Shape:
    """The stack as the one matrix that is stored: (1, padded rows of all groups, padded columns)."""
    groups, rows, columns = shape
    return 1, *swizzle_128x4.padded_shape(groups * rows, columns)


LAYOUTS = (
    replace(per_expert(swizzle_128x4.LAYOUTS[0]), name="swizzle_128x4_per_expert", source=SOURCE),
    Layout("swizzle_128x4_joint", swizzle_joint, unswizzle_joint, joint_padding, JOINT_SOURCE, (1, 1, 1)),
)
